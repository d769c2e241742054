"""The recording: what torch.export writes down while it runs a forward, in the words of torch.fx.

torch.export takes a forward apart into aten operators: a layer becomes its arithmetic, ``F.dropout`` an operator with the mode in
it. Here a layer of torch, and a call of a function of torch, is written down as the one operation that it is in the user's code.
It runs unseen on torch.export's own tensors, and its result is what torch.export goes on with. So sizes that vary, what is lifted
and what is refused stay torch.export's, and names, modes and operations are those of a symbolic trace. What cannot be told so (a
function under ``torch.vmap``) stays aten operators.
"""

from __future__ import annotations

import operator
import random
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from graphreg.errors import GraphRegError
from graphreg.ir import is_leaf, parts
from graphreg.torch_internals import (
    Changes,
    give_proxy,
    has_backward_hooks,
    innermost_transform,
    is_gradient_switch,
    is_transform_step,
    is_wrapped,
    leave_mask_unread,
    module_behind,
    proxy_of,
    size_decisions,
    take_assignments,
    take_module_calls,
    tell_of_seeds,
    version_of,
    without_functions,
    without_modes,
    without_proxies,
)
from graphreg.tracing.context import Answers, Questions
from graphreg.tracing.export.left import left_behind
from graphreg.tracing.export.op_record import (
    AT,
    KEPT,
    Call,
    Lost,
    Recording,
    Untold,
    Whole,
    as_called,
    by_foreign,
    by_sign,
    holds_tensors,
    mapped,
    recurrent_value,
    sizes_asked,
    switches,
)
from graphreg.tracing.export.patches import refuse_lost, wrapped
from graphreg.tracing.side_effects.places import REGISTERED, carries_data
from graphreg.tracing.symbolic.tape import attribute_of
from graphreg.tracing.tensors import Saved, tensors_in
from graphreg.tracing.type_inference import places_of


class Recorder(TorchFunctionMode):
    """Writes a forward down into a ``Recording``; ``leaves``: the submodules to keep whole, with the reason;
    ``answers``: to what the forward asks of its surroundings."""

    def __init__(self, model: nn.Module, leaves: Mapping[str, str], answers: Answers) -> None:
        super().__init__()
        self.told, self.model = Recording(leaves=dict(leaves)), model
        self.questions = Questions(lambda: self._scopes[-1] if self.seeing() else None, answers, Whole)
        self._paths = {id(module): path for path, module in model.named_modules()}
        self._scopes: list[str] = []  # none outside the model's forward
        self._tracer: Any = None
        self._unseen = False

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """While this lasts torch.export's tracer hands every call of a module over."""

        def around(theirs: Callable[..., Any]) -> Callable[..., Any]:
            def call_module(tracer: Any, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
                self._tracer = tracer
                return self._module(partial(theirs, tracer, m), m, forward, args, kwargs)

            return call_module

        with Changes() as patches, patches:
            take_module_calls(patches, around)
            refuse_lost(patches, self.seeing)
            for owner, name, instead in wrapped(self.function):
                patches.put(owner, name, instead)
            leave_mask_unread(patches)
            self._refuse_unseen(patches)
            with self.questions.heard(self.model, places_of(self.model)):
                yield

    # Modules

    def _module(self, traced: Callable[..., Any], m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        path = self._paths.get(id(module_behind(m)))
        if self._unseen or (path is None and self._scopes):
            return forward(*args, **kwargs)  # or made inside a forward and owned by nobody: its code is its caller's
        if path is None or (path == "" and self._scopes):
            return traced(forward, args, kwargs)
        if not self._scopes:
            return self._root(traced, forward, args, kwargs)
        if has_backward_hooks(m):
            self.told.leaves.setdefault(path, "it has backward hooks")
        if getattr(m, "graphreg_rules", None) is not None:
            raise GraphRegError(f"the submodule {path!r} is a rewritten module: graphreg.strip it, then regularize the whole.")
        self._scopes.append(path)
        try:
            if path in self.told.leaves or is_leaf(m):
                return self._leaf(path, m, traced, forward, args, kwargs)
            return self._inner(path, m, traced, forward, args, kwargs)
        finally:
            self._scopes.pop()

    def _inner(self, path: str, m: nn.Module, traced: Callable[..., Any], forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        start, drawn, depth = self._last(), random.getstate(), len(self._scopes)
        stack = dict(self._tracer.module_stack)
        try:
            held = _registered(m)
            value = traced(forward, args, kwargs)
            if random.getstate() != drawn:
                raise Whole("its forward draws random numbers, which a trace would freeze")
            if changed := sorted(name for name, value in _registered(m).items() if held.get(name) is not value):
                raise Whole(f"its forward assigns or registers {', '.join(changed)}, which torch.export loses")
        except Whole as reason:
            random.setstate(drawn)
            del self._scopes[depth:]
            self._tracer.module_stack.clear()  # it stopped in the midst of calls
            self._tracer.module_stack.update(stack)
            self._abandon(start)
            self.told.leaves[path] = str(reason)
            return self._leaf(path, m, traced, forward, args, kwargs)
        self.told.returns.setdefault(self._last(), []).append((path, type(m).__name__, self._found(value)))
        return value

    def _root(self, traced: Callable[..., Any], forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        self.told.given = mapped((args, kwargs), self._node)
        drawn, held = random.getstate(), _registered(self.model)
        self._scopes.append("")
        try:
            with self:
                value = traced(forward, args, kwargs)
            if random.getstate() != drawn:
                raise Whole("its forward draws random numbers itself, and a trace would freeze them")
            if new := sorted(_registered(self.model).keys() - held.keys()):  # what was there it follows
                raise Whole(f"its forward registers {', '.join(new)}, which a graph cannot do")
        except Whole as reason:
            raise Lost(f"{reason}; move that step into a submodule of its own, which graphreg then keeps whole") from None
        finally:
            self._scopes.clear()
            # torch.export puts attributes back, and with them what the forward's next call would have found
            self.told.left = left_behind(self.model, self._carried)
        self.told.output = mapped(value, self._node)
        for place, node in enumerate(self._tracer.graph.nodes):
            node.meta[AT] = place
            if node.op == "placeholder":
                self.told.inputs.append(place)
        return value

    def _leaf(self, path: str, m: nn.Module, traced: Callable[..., Any], forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        drawn = random.getstate()  # of a module that draws by Python: not of the trace's concern
        with self._its_own_decisions():
            try:
                run = partial(recurrent_value, m) if isinstance(m, nn.RNNBase) else forward
                return self._written(Call("call_module", path, path), run, args, kwargs)
            except Untold:
                return traced(forward, args, kwargs)
            finally:
                random.setstate(drawn)

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.seeing():
            self._asked(sizes_asked(func), args)
            if attribute_of(func) == "requires_grad" and func.__name__ == "__get__" and not by_foreign():
                self._flag(args[0])
        return self.function(func, by_sign(), *args, **(kwargs or {}))

    def _asked(self, names: list[str], args: Any) -> None:
        proxy = proxy_of(args[0], self._tracer) if names and isinstance(args[0], Tensor) else None
        if proxy is not None:
            self.told.returns.setdefault(self._last(), []).extend((name, self._scopes[-1], proxy.node) for name in names)

    def _flag(self, tensor: Tensor) -> None:
        """The forward asks whether a tensor requires gradients: of a parameter the graph asserts it."""
        name = next((name for name, each in self.model.named_parameters(remove_duplicate=False) if each is tensor), None)
        if name is None:
            raise Whole("it asks whether a value requires gradients, which depends on the call")
        self.told.flags[name] = bool(tensor.requires_grad)

    def function(self, func: Callable[..., Any], sign: bool, *args: Any, **kwargs: Any) -> Any:
        """Call a function of torch, as one operation of the recording where it is one."""
        if not self.seeing():
            return func(*args, **kwargs)
        if is_gradient_switch(func):
            if args == (torch.is_grad_enabled(),):
                return None
            raise Whole("it works under torch.no_grad or the like, and a trace would lose that")
        if switches(func, args, kwargs):
            raise Whole("it switches whether a value requires gradients, and torch.export loses that")
        # torch.func's own steps give no tensor, and what gives none is run again: a level of vmap would be entered twice, and left once
        call = None if is_transform_step(func) else as_called(func, sign, self._scopes[-1])
        with self._its_own_decisions(), self._untouched(func, args, kwargs):
            if call is None or innermost_transform() is not None:
                return func(*args, **kwargs)
            try:
                return self._written(call, func, args, kwargs)
            except Untold:
                return func(*args, **kwargs)

    @contextmanager
    def _untouched(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Iterator[None]:
        """Refuses what an operation does that no graph would do, and undoes it: torch.export itself runs a write into a tensor that
        is no parameter, buffer or value of the forward, and then never again."""
        name = str(getattr(func, "__name__", ""))
        if name in ("__set__", "__delete__") and attribute_of(func) != "requires_grad":
            raise Whole(f"it assigns .{attribute_of(func)} of a tensor, which a graph cannot carry")
        if name in ("register_hook", "register_post_accumulate_grad_hook"):
            raise Whole("it registers a hook on a tensor, which a graph cannot carry")
        real = [tensor for tensor in tensors_in((args, kwargs)) if type(tensor) in (Tensor, nn.Parameter)]
        if any(isinstance(tensor, nn.Parameter) for tensor in real):
            raise Whole("it computes with a parameter that it does not get from its module by name, but from a list or the like")
        if not real:
            yield
            return
        with without_modes():
            saved = [Saved(tensor) for tensor in real]
        yield
        written = [each for each in saved if version_of(each.tensor) != each.version]
        with without_modes():
            for each in written:
                each.put_back()
        if written:
            raise Whole("it writes into a tensor that it neither makes nor has as a buffer: an attribute, a global, a default argument")

    @contextmanager
    def _its_own_decisions(self) -> Iterator[None]:
        decisions = size_decisions()
        before = len(decisions)
        yield
        self.told.own_guards.update(range(before, len(decisions)))

    def _written(self, call: Call, run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run the operation unseen, and write it down as one."""
        told, more = mapped((args, kwargs), self._proxy, whole=True)
        self._unseen = True
        try:
            # torch.export would write the regions of a module (no_grad, autocast) down too
            alone = without_functions() if call.op == "call_module" else nullcontext()
            with without_proxies(), alone:
                value = run(*args, **kwargs)
            if call.target is not operator.setitem and not holds_tensors(value):
                raise Untold
            key = str(len(self.told.calls))
            self.told.calls[key] = call
            given = (*reversed(told[:2]), *told[2:], *call.more) if call.swapped else (*told, *call.more)
            # each look at a tensor would go through three modes in Python, and each size be written down that is multiplied for it
            with without_functions(), without_proxies():
                proxy = self._tracer.create_proxy("call_function", KEPT, (key, given, more), {})
                proxy.node.meta["val"] = None
                return give_proxy(value, proxy, self._tracer)
        finally:
            self._unseen = False

    def _carried(self, value: Tensor) -> fx.Proxy | None:
        """The name in the graph of a value that has the inputs' data in it."""
        proxy = None if is_wrapped(value) else proxy_of(value, self._tracer)

        def called(node: fx.Node) -> str:
            target = self.told.calls[str(node.args[0])].target if node.target is KEPT else node.target
            return target if isinstance(target, str) else str(getattr(target, "__name__", "")).partition(".")[0]

        return proxy if proxy is not None and carries_data(proxy.node, called) else None

    def _refuse_unseen(self, patches: Changes) -> None:
        """Until the changes end: refuse what no mode of torch's is told of, seeds and names that a tensor is given."""
        thread = threading.get_ident()

        def seeded() -> None:
            if threading.get_ident() == thread and self.seeing():
                raise Whole("it seeds torch's generator, which a graph cannot do")

        def assigned(tensor: Tensor, name: str, value: Any) -> None:
            if not hasattr(Tensor, name) and self.seeing() and not by_foreign():
                raise Whole(f"it assigns .{name} of a tensor, which a graph cannot carry")
            object.__setattr__(tensor, name, value)

        tell_of_seeds(patches, seeded)
        take_assignments(patches, assigned)

    def seeing(self) -> bool:
        """Whether code of the model's own runs now that is being written down."""
        return bool(self._scopes) and not self._unseen

    def _proxy(self, value: Any) -> fx.Proxy:
        """What torch.export's graph calls a tensor or a size."""
        proxy = None if isinstance(value, Tensor) and is_wrapped(value) else proxy_of(value, self._tracer)
        if proxy is None:
            raise Untold
        return proxy

    def _node(self, value: Any) -> fx.Node:
        return self._proxy(value).node

    def _found(self, value: Any) -> list[tuple[fx.Node, tuple[str, ...], bool]]:
        """The tensors that a module returned, with their ports."""
        listed = [(("out",), value, True)] if isinstance(value, Tensor) else parts(value)
        found = []
        for ports, part, default in listed:
            if isinstance(part, Tensor) and (proxy := proxy_of(part, self._tracer)) is not None:
                found.append((proxy.node, ports, default))
        return found

    def _last(self) -> fx.Node | None:
        return next(iter(reversed(self._tracer.graph.nodes)), None)

    def _abandon(self, start: fx.Node | None) -> None:
        for node in reversed(self._tracer.graph.nodes):
            if node is start:
                break
            self.told.abandoned.add(node)


def _registered(module: nn.Module) -> dict[str, Any]:
    """A module's own buffers, parameters and modules."""
    return {name: value for kind in REGISTERED for name, value in vars(module)[kind].items() if value is not None}
