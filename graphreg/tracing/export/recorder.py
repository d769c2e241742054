"""The recorder: makes torch.export record each call of a layer or a torch function as one operation.

torch.export itself takes a forward apart into aten operators: a layer becomes its arithmetic, ``F.dropout`` an operator with the mode
fixed in it. Here each call of a torch layer or function is recorded as the one operation that it is in the user's code. The call runs
on torch.export's fake tensors while torch.export records nothing, and torch.export goes on with the result. So torch.export still
finds out which sizes may vary, lifts parameters and refuses what it does not support, while names, modes and operations are those of a
symbolic trace. A call that cannot be recorded as one operation, such as one under ``torch.vmap``, stays in aten operators.
"""

from __future__ import annotations

import operator
import random
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from graphreg.errors import GraphRegError
from graphreg.ir.call_records import CallRecord, call_key, in_containers, replaced_leaf
from graphreg.ir.contents import called_by_foreign_code
from graphreg.ir.made_objects import held_objects
from graphreg.ir.naming import elements
from graphreg.ir.operations import is_single_operation
from graphreg.ir.source_location import origin_now
from graphreg.torch_internals.autograd import version_of
from graphreg.torch_internals.export import give_proxy, module_behind, proxy_of, take_module_calls
from graphreg.torch_internals.fake_tensors import size_decisions, take_assignments
from graphreg.torch_internals.functorch import in_unwritten_jvp, innermost_transform, is_transform_step, is_wrapped
from graphreg.torch_internals.modules import REGISTERED, has_backward_hooks, has_pre_hooks, leave_mask_unread, parameters_by_name
from graphreg.torch_internals.patching import Changes
from graphreg.torch_internals.random_state import on_seeding
from graphreg.torch_internals.torch_modes import is_gradient_switch, without_functions, without_modes, without_proxies
from graphreg.tracing.checkpoints import CHECKPOINTS, CURE
from graphreg.tracing.export.conditions import note_decisions, squeezed
from graphreg.tracing.export.final_state import final_state
from graphreg.tracing.export.op_record import (
    AT,
    DIFFERENTIATES,
    FIXED_RESULTS,
    RECORDED_OP,
    SYMBOLS,
    KeepOpaque,
    OpCall,
    OpRecord,
    TensorMap,
    UnsupportedValue,
    UntraceableModel,
    call_of,
    called_by_operator,
    holds_tensors,
    recurrent_value,
    size_reads,
    switches_gradients,
)
from graphreg.tracing.export.patches import refuse_untraceable, single_operations
from graphreg.tracing.global_queries import Answers, EnvironmentQueries
from graphreg.tracing.isinstance_patch import model_globals, number_isinstance
from graphreg.tracing.side_effects.state_places import carries_data
from graphreg.tracing.symbolic.factory_tape import accessed_attribute
from graphreg.tracing.tensors import LEFT_IN_TENSORS, SavedTensor, reads_what_is_left, require_own_parameters, tensors_in


class Recorder(TorchFunctionMode):
    """The function mode that records a forward while torch.export traces it.

    Attributes:
        record: What was recorded.
        model: The model.
        environment: The queries of global state that the forward made.
    """

    def __init__(self, model: nn.Module, opaque: Mapping[str, str], answers: Answers, negated: Collection[str] = ()) -> None:
        """Prepare to record.

        Args:
            model: The model.
            opaque: Opaque modules by path, with reasons.
            answers: Answers that replace torch's own, by the name of the query of global state.
            negated: Texts of conditions on sizes for which the forward gets the opposite answer.
        """
        super().__init__()
        self.record, self.model = OpRecord(opaque=dict(opaque)), model
        self.environment = EnvironmentQueries(lambda: self._scopes[-1] if self.is_recording() else None, answers, KeepOpaque)
        self._paths = {id(module): path for path, module in model.named_modules()}
        self._own = dict[int, str]()  # what torch.export has put in the places of parameters, by id
        self._scopes: list[str] = []  # empty outside the model's forward
        self._tracer: Any = None
        self._thread = threading.get_ident()
        self._running_op, self._ops, self._negated = False, 0, negated

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Intercept the module and function calls of torch.export's trace within the block."""

        def around(original: Callable[..., Any]) -> Callable[..., Any]:
            def call_module(tracer: Any, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
                self._tracer = tracer
                return self._module(partial(original, tracer, m), m, forward, args, kwargs)

            return call_module

        with Changes() as patches, patches:
            take_module_calls(patches, around)
            refuse_untraceable(patches, self.is_recording)
            for owner, name, instead in single_operations(self.function):
                patches.put(owner, name, instead)
            leave_mask_unread(patches)
            self._refuse_untraced_changes(patches)
            note_decisions(patches, lambda: self.is_recording() and not self._ops, self.record.decisions, self._negated)
            places = model_globals(self.model)
            patches.put_into(places.all, "isinstance", number_isinstance)  # a model's own function of this name stays
            self.environment.intercept(patches, self.model, places.asking)
            yield

    # Modules

    def _module(self, traced: Callable[..., Any], m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Handle a call of a module. ``traced`` is the method of torch.export's tracer that traces the module's code."""
        path = self._paths.get(id(module_behind(m)))
        if self._running_op or (path is None and self._scopes):
            return forward(*args, **kwargs)  # inside an operation, or not a submodule, so that its code counts as the caller's
        if path is None or (path == "" and self._scopes):
            return traced(forward, args, kwargs)
        if not self._scopes:
            self._own = {id(each): name for name, each in parameters_by_name(self.model).items()}
            return self._root(traced, forward, args, kwargs)

        if has_backward_hooks(m):
            self.record.opaque.setdefault(path, "it has backward hooks")
        if getattr(m, "graphreg_rules", None) is not None:
            raise GraphRegError(f"the submodule {path!r} is a rewritten module. Call graphreg.strip on it, then regularize the model.")
        self._scopes.append(path)
        try:
            if path in self.record.opaque or is_single_operation(m):
                require_own_parameters(m, path, self._own, self._own.values())
                return self._opaque(path, m, traced, forward, args, kwargs)
            return self._transparent(path, m, traced, forward, args, kwargs)
        finally:
            self._scopes.pop()

    def _transparent(self, path: str, m: nn.Module, traced: Callable[..., Any], forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Trace the code of a submodule; if that cannot be done, make the submodule opaque."""
        start, drawn, depth = self._last(), random.getstate(), len(self._scopes)
        stack, keys = dict(self._tracer.module_stack), list[str]()

        # torch.export's key of this call is on its stack only while the module's code runs
        def keyed(*args: Any, **kwargs: Any) -> Any:
            keys.append(next(reversed(self._tracer.module_stack)))
            return forward(*args, **kwargs)

        try:
            registered, inputs = _registered(m), in_containers((args, kwargs), replaced_leaf if has_pre_hooks(m) else self._element)
            value = traced(keyed, args, kwargs)
            if random.getstate() != drawn:
                raise KeepOpaque("its forward draws random numbers, which a trace would freeze")
            if changed := sorted(name for name, value in _registered(m).items() if registered.get(name) is not value):
                raise KeepOpaque(f"its forward assigns or registers {', '.join(changed)}, which torch.export loses")
        except KeepOpaque as reason:
            random.setstate(drawn)
            del self._scopes[depth:]
            self._tracer.module_stack.clear()  # the trace stopped inside nested calls, which are still on the stack
            self._tracer.module_stack.update(stack)
            self._abandon(start)
            self.record.opaque[path] = str(reason)
            return self._opaque(path, m, traced, forward, args, kwargs)
        self.record.returns.setdefault(self._last(), []).append((path, type(m).__name__, self._returned_tensors(value)))
        called = CallRecord(inputs, in_containers(value, self._element), origin_now())
        self.record.module_calls += [(call_key(path, key), called) for key in keys[:1]]
        return value

    def _root(self, traced: Callable[..., Any], forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Trace the model's own forward, and record its arguments, its output and the final attributes of its modules."""
        self.record.arguments = TensorMap(self._node).of((args, kwargs))
        held = held_objects(self.model, args, kwargs)
        drawn, registered = random.getstate(), _registered(self.model)

        self._scopes.append("")
        try:
            with self:
                value = traced(forward, args, kwargs)
            if random.getstate() != drawn:
                raise KeepOpaque("its forward draws random numbers itself, and a trace would freeze them")
            # Only new names are refused: torch.export follows assignments to buffers that were registered before.
            now = _registered(self.model)
            if new := sorted(now.keys() - registered.keys()):
                raise KeepOpaque(f"its forward registers {', '.join(new)}, which a graph cannot do")
            self.record.assigned = {name for name in now if now[name] is not registered[name]}
            if moved := sorted(self.record.assigned & vars(self.model)["_parameters"].keys()):
                raise KeepOpaque(f"its forward assigns another tensor to the parameter {moved[0]}, which a graph cannot do")
        except KeepOpaque as reason:
            cure = CURE if str(reason) == CHECKPOINTS else "move that step into a submodule of its own, which then becomes an opaque module"
            raise UntraceableModel(f"{reason}; {cure}") from None
        finally:
            self._scopes.clear()
            # torch.export restores the attributes that the forward assigned, but the next call may read what was assigned.
            self.record.final_attributes = final_state(self.model, self._data_proxy)

        # torch.export cannot return the user's objects: it gets the tensors that they hold
        tensors = list[Any]()

        def returned(tensor: Any) -> fx.Node:
            tensors.append(tensor)
            return self._node(tensor)

        output = TensorMap(returned, held=held)
        self.record.output = output.of(value)

        for place, node in enumerate(self._tracer.graph.nodes):
            node.meta[AT] = place
            if node.op == "placeholder":
                self.record.input_places.append(place)
        return tensors if output.made else value

    def _opaque(self, path: str, m: nn.Module, traced: Callable[..., Any], forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Record a call of a layer or opaque module as one operation."""
        drawn = random.getstate()  # an opaque module may draw from ``random``
        with self._decisions_of_op():
            try:
                run = partial(recurrent_value, m) if isinstance(m, nn.RNNBase) else forward
                return self._record_op(OpCall("call_module", path, path), run, args, kwargs)
            except UnsupportedValue:
                return traced(forward, args, kwargs)
            finally:
                random.setstate(drawn)

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.is_recording():
            # names are numbered as in a symbolic trace, where each read of a size is a node
            reads = size_reads(func)
            proxy = proxy_of(args[0], self._tracer) if reads and isinstance(args[0], Tensor) else None
            if proxy is not None:
                self.record.returns.setdefault(self._last(), []).extend((name, self._scopes[-1], proxy.node) for name in reads)

            if accessed_attribute(func) in LEFT_IN_TENSORS and func.__name__ == "__get__" and not called_by_foreign_code():
                raise KeepOpaque(reads_what_is_left(accessed_attribute(func)))
            if accessed_attribute(func) == "requires_grad" and func.__name__ == "__get__" and not called_by_foreign_code():
                self._flag(args[0])
            if func is Tensor.stride and not called_by_foreign_code():
                self.record.asks_layout = True
                self.record.strides |= {proxy.node} if proxy is not None else set()
        value = self.function(func, called_by_operator(), *args, **(kwargs or {}))
        # a method that is written in Python has itself called ``handle_torch_function``
        if self.is_recording() and _is_plain(value) and not called_by_foreign_code(2 if isinstance(func, FunctionType) else 0):
            self._answered(func, args, kwargs or {}, value)
        return value

    def _flag(self, tensor: Tensor) -> None:
        """Record that the forward reads ``requires_grad`` of a parameter, so that the graph asserts it."""
        name = next((name for name, each in parameters_by_name(self.model).items() if each is tensor), None)
        if name is None:
            raise KeepOpaque("it reads requires_grad of a value, which depends on the call")
        self.record.flags[name] = bool(tensor.requires_grad)

    def _answered(self, func: Callable[..., Any], args: Any, kwargs: Any, value: Any) -> None:
        """Record the plain value that a method of a tensor gave, such as ``is_contiguous``, so that the graph asserts it."""
        name = str(getattr(func, "__name__", ""))
        is_question = getattr(Tensor, name, None) is func and not name.startswith("__") and name not in FIXED_RESULTS
        if is_question and next(tensors_in((args[1:], kwargs)), None) is None and (proxy := proxy_of(args[0], self._tracer)) is not None:
            self.record.answers.append((proxy.node, name, tuple(args[1:]), dict(kwargs), value))

    def function(self, func: Callable[..., Any], by_operator: bool, *args: Any, **kwargs: Any) -> Any:
        """Call a function of torch, and record it as one operation where possible."""
        if not self.is_recording():
            return func(*args, **kwargs)
        if is_gradient_switch(func):
            # such as ``torch.enable_grad()`` where gradients are enabled anyway
            if args == (torch.is_grad_enabled(),):
                return None
            raise KeepOpaque("it works under torch.no_grad or the like, and a trace would lose that")
        if switches_gradients(func, args, kwargs):
            raise KeepOpaque("it switches whether a value requires gradients, and torch.export loses that")
        if in_unwritten_jvp() and not is_transform_step(func):
            raise KeepOpaque(DIFFERENTIATES)
        if getattr(func, "__name__", "") in ("squeeze", "squeeze_"):
            self.record.squeezed += squeezed(*args, **kwargs)
        # ``_record_op`` runs the call and refuses a result without tensors. The call is then run again, unrecorded. A step of torch.func,
        # such as entering vmap, must not run twice, so it is never recorded.
        call = None if is_transform_step(func) else call_of(func, by_operator, self._scopes[-1])
        with self._decisions_of_op(), self._side_effects_refused(func, args, kwargs):
            if call is None or innermost_transform() is not None:
                return func(*args, **kwargs)
            try:
                return self._record_op(call, func, args, kwargs)
            except UnsupportedValue:
                return func(*args, **kwargs)

    @contextmanager
    def _side_effects_refused(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Iterator[None]:
        """Refuse an operation with side effects that a graph would not repeat, and undo its writes.

        An example is a write into a tensor that is no parameter, no buffer and no value of the forward. torch.export itself would run
        such an operation once, while it traces, and leave it out of its graph.
        """
        name = str(getattr(func, "__name__", ""))
        if name in ("__set__", "__delete__") and accessed_attribute(func) != "requires_grad":
            raise KeepOpaque(f"it assigns .{accessed_attribute(func)} of a tensor, which a graph cannot carry")
        if name in ("register_hook", "register_post_accumulate_grad_hook"):
            raise KeepOpaque("it registers a hook on a tensor, which a graph cannot carry")
        # the values of the trace are fake tensors, so any other is from outside of the graph
        real = [tensor for tensor in tensors_in((args, kwargs)) if type(tensor) in (Tensor, nn.Parameter)]
        if any(isinstance(tensor, nn.Parameter) for tensor in real):
            raise KeepOpaque("it computes with a parameter that it does not read from its module by name, but from a list or the like")
        if not real:
            yield
            return
        with without_modes():
            saved = [SavedTensor(tensor) for tensor in real]
        yield
        written = [each for each in saved if version_of(each.tensor) != each.version]
        with without_modes():
            for each in written:
                each.restore()
        if written:
            raise KeepOpaque("it writes into a tensor that it does not make and that is no buffer: an attribute, a global or a default")

    @contextmanager
    def _decisions_of_op(self) -> Iterator[None]:
        """Note in ``op_guards`` the size guards that an operation makes within the block."""
        decisions = size_decisions()
        before = len(decisions)
        self._ops += 1
        try:
            yield
        finally:
            self._ops -= 1
        self.record.op_guards.update(range(before, len(decisions)))

    def _record_op(self, call: OpCall, run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run an operation while torch.export records nothing, and record it as one node."""
        positional, keywords = TensorMap(self._proxy, strict=True).of((args, kwargs))
        self._running_op = True
        try:
            # Without this, torch.export would still record the no_grad and autocast regions inside a module.
            alone = without_functions() if call.op == "call_module" else nullcontext()
            with without_proxies(), alone:
                value = run(*args, **kwargs)
            if call.target is not operator.setitem and not holds_tensors(value):
                raise UnsupportedValue
            key = str(len(self.record.calls))
            self.record.calls[key] = replace(call, origin=origin_now())
            ordered = (*reversed(positional[:2]), *positional[2:]) if call.swapped else positional
            # Without this, each access to a tensor would go through three modes in Python, and size arithmetic would be recorded.
            with without_functions(), without_proxies():
                proxy = self._tracer.create_proxy("call_function", RECORDED_OP, (key, (*ordered, *call.more), keywords), {})
                proxy.node.meta["val"] = None
                return give_proxy(value, proxy, self._tracer)
        finally:
            self._running_op = False

    def _data_proxy(self, value: Tensor) -> fx.Proxy | None:
        """Return the proxy of a tensor if the tensor was computed from the inputs' data; else None."""
        proxy = None if is_wrapped(value) else proxy_of(value, self._tracer)

        def called(node: fx.Node) -> str:
            call = self.record.calls[str(node.args[0])] if node.target is RECORDED_OP else None
            target = node.target if call is None else "" if call.op == "call_module" else call.target
            return target if isinstance(target, str) else str(getattr(target, "__name__", "")).partition(".")[0]

        return proxy if proxy is not None and carries_data(proxy.node, called) else None

    def _refuse_untraced_changes(self, patches: Changes) -> None:
        """Make the model's code raise where it seeds a generator or adds an attribute to a tensor. No ``TorchFunctionMode`` sees this."""

        def seeded() -> None:
            if self.is_recording():
                raise KeepOpaque("it seeds torch's generator, which a graph cannot do")

        def assigned(tensor: Tensor, name: str, value: Any) -> None:
            if not hasattr(Tensor, name) and self.is_recording() and not called_by_foreign_code():
                raise KeepOpaque(f"it assigns .{name} of a tensor, which a graph cannot carry")
            object.__setattr__(tensor, name, value)

        on_seeding(patches, seeded)
        take_assignments(patches, assigned)

    def is_recording(self) -> bool:
        """Return whether the model's own code runs now, in the thread that traces, and is being recorded."""
        return bool(self._scopes) and not self._running_op and threading.get_ident() == self._thread

    def _proxy(self, value: Any) -> fx.Proxy:
        """Return the proxy of a tensor or size in torch.export's graph; raise UnsupportedValue if it has none."""
        proxy = None if isinstance(value, Tensor) and is_wrapped(value) else proxy_of(value, self._tracer)
        if proxy is None:
            raise UnsupportedValue
        return proxy

    def _node(self, value: Any) -> fx.Node:
        """Return the node of a tensor or size in torch.export's graph."""
        return self._proxy(value).node

    def _element(self, value: Any) -> Any:
        """Return the node of an element of what a call takes or returns; the element itself if it has none."""
        if isinstance(value, torch.SymInt) and (constant := value.node.maybe_as_int()) is not None:
            return constant
        try:
            return self._node(value) if isinstance(value, (Tensor, *SYMBOLS)) else value
        except UnsupportedValue:
            return value

    def _returned_tensors(self, value: Any) -> list[tuple[fx.Node, tuple[str, ...], bool]]:
        """Return the tensors in a module's result, with their ports."""
        listed = [(("out",), value, True)] if isinstance(value, Tensor) else elements(value)
        tensors = []
        for ports, part, default in listed:
            if isinstance(part, Tensor) and (proxy := proxy_of(part, self._tracer)) is not None:
                tensors.append((proxy.node, ports, default))
        return tensors

    def _last(self) -> fx.Node | None:
        """Return the last node of torch.export's graph."""
        return next(iter(reversed(self._tracer.graph.nodes)), None)

    def _abandon(self, start: fx.Node | None) -> None:
        """Mark the nodes after ``start`` as abandoned."""
        for node in reversed(self._tracer.graph.nodes):
            if node is start:
                break
            self.record.abandoned.add(node)


def _registered(module: nn.Module) -> dict[str, Any]:
    """Return a module's own buffers, parameters and submodules by name."""
    return {name: value for kind in REGISTERED for name, value in vars(module)[kind].items() if value is not None}


def _is_plain(value: Any) -> bool:
    """Return whether a value is a bool, a number, a text, or a tuple of such values. A size that varies is not."""
    return all(map(_is_plain, value)) if type(value) is tuple else type(value) in (bool, int, float, str)
