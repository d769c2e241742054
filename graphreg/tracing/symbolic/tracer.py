"""The symbolic tracer: torch.fx's, with names for every value and leaves for what it cannot see into.

A node's names go to ``node.meta["site"]``: the path of its module and its labels. They are plain data, so that
they survive pickling, and no later stage needs the tracer again.
"""

from __future__ import annotations

import inspect
import math
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn

from graphreg.errors import GraphRegError, TraceError, first_line
from graphreg.ir import (
    WRAPPED,
    BufferConstants,
    Namer,
    Operations,
    building,
    gives_tuple,
    is_drop_path,
    is_size,
    is_stack,
    label_node,
    label_output,
    label_site,
)
from graphreg.torch_internals import (
    Changes,
    ModuleStack,
    before_checkpoints,
    bound_call,
    has_backward_hooks,
    raise_interrupt,
    randomness,
    regions,
    restore_fx_patches,
    restore_randomness,
    take_as_one,
)
from graphreg.tracing.context import CHECKPOINTS, Answers, Questions
from graphreg.tracing.shape_decisions import Answering
from graphreg.tracing.symbolic.factories import settle_factories
from graphreg.tracing.symbolic.ports import assert_guesses, settle_ports
from graphreg.tracing.symbolic.proxies import BufferProxy, Value
from graphreg.tracing.symbolic.tape import Tape
from graphreg.tracing.type_inference import answered, places_of

STACKED = "torch.fx does not see into it; torch.export does, with example_inputs"
PLAIN = (float, int, bool, str, type(None), torch.dtype, torch.device)


class SiteTracer(Answering):
    """Traces a module; ``leaves`` maps the paths it keeps whole to the reason, ``held`` the arguments it fixes.

    ``examples``: the inputs by argument name, which answer what the forward decides on shapes; ``answers``: to what it asks of its
    surroundings.
    """

    def __init__(
        self, leaves: dict[str, str], held: dict[str, Any], examples: Mapping[str, Any] | None = None, answers: Answers | None = None
    ) -> None:
        # torchvision wraps its operations as leaves in its own listing; where it is loaded, so do we, for its names.
        ops = sys.modules.get("torchvision.ops")
        super().__init__(examples or {}, autowrap_modules=(math, ops) if ops else (math,))
        take_as_one(self, WRAPPED, (torch, torch.nn.utils.rnn))
        self.leaves, self.held = dict(leaves), held
        self.thread = threading.get_ident()  # torch.fx patches nn.Module for all threads, and one traces
        self.questions = Questions(lambda: None if self.asking else self.scope_path, answers or {})
        self._namer = Namer(())
        self._outputs: list[tuple[str, str, str, Any]] = []  # (name, module path, class, value) of each module call
        self._parameter_cache: dict[str, fx.Proxy] = {}
        self._buffers: dict[int, str] = {}
        self.region = regions()
        self._constants = BufferConstants()
        self._calls: list[str] = []  # what ``num_calls`` counts, in order: a copy of it at each call would grow as their square
        self.operations = Operations(nn.Module())
        self.tape = Tape(self, nn.Module())
        self.module_stack = ModuleStack()

    def trace(self, root: nn.Module, concrete_args: dict[str, Any] | None = None) -> fx.Graph:  # type: ignore[override]
        """The graph of a module in the mode that it is in, each value labelled. Raises TraceError for what a trace would lose."""
        self.operations = Operations(root)
        self._namer = Namer(self.operations.modules.keys() - {""})
        self._buffers = {id(buffer): name for name, buffer in root.named_buffers()}
        self._constants = BufferConstants(set(self._buffers.values()))
        self.tape = Tape(self, root)
        drawn = randomness()
        places = places_of(root)
        with self._checkpoints_refused(), answered(places), self.questions.heard(root, places):
            graph = super().trace(root)
        if randomness() != drawn:
            raise TraceError(
                f"{type(root).__name__}.forward draws random numbers itself (random, torch.rand), and a trace would freeze them. "
                "Move the draw into a submodule, which graphreg then keeps whole, or make it from the input (torch.rand_like)."
            )
        if (assigned := _assigned_buffer(root)) is not None:
            raise TraceError(
                f"{type(root).__name__}.forward assigns the buffer self.{assigned}, which a graph cannot carry. Update it in "
                "place (self.x.copy_(...), self.x.mul_(...)), or move it into a submodule, which graphreg then keeps whole."
            )
        settle_factories(graph, self.tape)
        for name, path, kind, value in self._outputs:
            label_output(value, name, path, kind)
        for node in graph.nodes:
            # emitted code would ask torch.fx to wrap the name "torch.full", and no later trace would run
            if node.target in WRAPPED or str(getattr(node.target, "__module__", "")).startswith("torch."):
                node.meta.pop("is_wrapped", None)
        settle_ports(graph, self.operations)
        if not self.examples:  # these tell
            assert_guesses(graph, self.operations)
        return graph

    @contextmanager
    def _checkpoints_refused(self) -> Iterator[None]:
        """Activation checkpointing is traced away otherwise; the module that asks for it is kept whole instead."""

        def refuse() -> None:
            if threading.get_ident() == self.thread:
                raise RuntimeError(CHECKPOINTS)

        with Changes() as changes, changes:
            before_checkpoints(changes, refuse)
            yield

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        """torch.fx asks what to call, and with what: as a user calls the root, with its hooks and a forward set on the instance (fx
        itself reads ``type(root).forward`` and loses both); an argument that is held goes in as its value."""
        root, values, keywords, variadic = self.root, list[Any](), list[str | None](), list[int]()
        for name, parameter in inspect.signature(root.forward).parameters.items():
            star = "*" if parameter.kind is parameter.VAR_POSITIONAL else "**" if parameter.kind is parameter.VAR_KEYWORD else ""
            default = () if parameter.default is parameter.empty else (parameter.default,)
            proxy = self.create_proxy("placeholder", star + name, default, {})
            if star:
                variadic.append(len(values))
            values.append(self.held.get(name, proxy))
            keywords.append(name if parameter.kind is parameter.KEYWORD_ONLY else None)

        def call(*given: Any) -> Any:
            restore_fx_patches()
            flat = [(k, v) for i, (k, v) in enumerate(zip(keywords, given, strict=True)) if i not in variadic]
            rest = [given[i] for i in variadic]
            more = next((v for i, v in zip(variadic, rest, strict=True) if keywords[i] is None), ())
            with self.tape:
                return bound_call(root)(
                    *(v for k, v in flat if k is None), *(more if variadic else ()), **{k: v for k, v in flat if k is not None}
                )

        return call, values

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name in self.leaves or is_drop_path(m) or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """torch.fx asks at each call of a module: traced, or kept whole where that raises; its value gets its name."""
        if self.asking or threading.get_ident() != self.thread:
            return forward(*args, **kwargs)
        try:
            path = self.path_of_module(m)
        except NameError:  # made inside a forward and owned by nobody: its code is its caller's
            return forward(*args, **kwargs)
        if has_backward_hooks(m):
            self.leaves.setdefault(path, "it has backward hooks")
        if getattr(m, "graphreg_rules", None) is not None:
            raise GraphRegError(f"the submodule {path!r} is a rewritten module: graphreg.strip it, then regularize the whole.")
        with self._scope(path):
            if self.is_leaf_module(m, path):
                if is_stack(m):
                    self.leaves.setdefault(path, STACKED)
                return self._called(path, m, forward, args, kwargs)
            mark, buffers, drawn = self._mark(), dict(m._buffers), randomness()
            try:
                value = self._called(path, m, forward, args, kwargs)
                if (assigned := _assigned_buffer(m)) is not None:
                    raise AttributeError(f"its forward assigns the buffer {assigned}")
                if randomness() != drawn:
                    raise AttributeError("its forward draws random numbers, which a trace would freeze")
            except (GraphRegError, RecursionError):  # a trace of the rest would end at the same depth
                raise
            except Exception as error:  # whatever a forward raises on proxies: the module is kept whole instead
                raise_interrupt(error)
                self._roll_back(mark)
                m._buffers.update(buffers)
                restore_randomness(drawn)
                self.leaves[path] = first_line(error)
                return self._called(path, m, forward, args, kwargs)
        value = self.tape.returned(value)
        self._outputs.append((self._namer.module(path), path, type(m).__name__, value))
        return value

    def _called(self, path: str, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        self._calls.append(path)
        return super().call_module(m, forward, args, kwargs)

    def create_proxy(self, kind: str, target: Any, *rest: Any, **more: Any) -> fx.Proxy:
        proxy = super().create_proxy(kind, target, *rest, **more)
        self.tape.made(proxy.node)
        if is_size(proxy.node, self.sizes.__contains__):
            self.sizes.add(proxy.node)
        if kind not in ("placeholder", "call_module") and self._constants.take(proxy.node):
            label_site(proxy.node, self._scopes[-1])
            return proxy
        label_node(proxy.node, self._scopes[-1], self.operations.modules, self._namer)
        return proxy

    def is_tuple(self, node: fx.Node) -> bool:
        return gives_tuple(node, self.operations.modules)

    def create_arg(self, a: Any) -> Any:
        """torch.fx's, for what a node takes: nodes in place of proxies."""
        kind = type(a)  # what arguments mostly are goes first: fx asks twenty questions of each
        if kind in PLAIN:
            return a
        if kind is Value:
            return a.node
        if kind is tuple:
            return tuple(map(self.create_arg, a))
        if (found := building(a)) is not None:  # fx makes a plain dict of an OrderedDict; the model's own type is built in the graph
            target, args, kwargs = found
            return self.create_node("call_function", target, self.create_arg(args), {k: self.create_arg(v) for k, v in kwargs.items()})
        if isinstance(a, torch.Tensor) and not isinstance(a, nn.Parameter):
            node: Any = super().create_arg(a)
            if not self.asking:
                self.tape.reads(node, a)
                if self.tape.is_state(a):
                    self._constants.add(node)
            return node
        return super().create_arg(a)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return Value.of(node, self)

    def create_node(self, kind: str, *rest: Any, **more: Any) -> fx.Node:
        if kind not in ("placeholder", "get_attr", "output") and regions() != self.region:
            raise RuntimeError(
                "this runs under torch.no_grad, autocast or the like, and a trace would lose that; keep it in a submodule of its own"
            )
        return super().create_node(kind, *rest, **more)

    def alias(self, tensor: torch.Tensor) -> fx.Proxy:
        """A tensor as a value of the graph, which has no name of its own."""
        node = self.create_node("call_function", torch.ops.aten.alias.default, (self.create_arg(tensor),), {})
        label_site(node, self.scope_path)
        self.tape.made(node)
        return self.proxy(node)

    @property
    def scope_path(self) -> str:
        """The path of the module whose code runs."""
        return self._scopes[-1]

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        self._parameter_cache = parameter_proxy_cache
        if self.asking or threading.get_ident() != self.thread:
            return attr_val
        name = self._buffers.get(id(attr_val))
        if name is not None and isinstance(attr_val, torch.Tensor):
            # fx reads buffers while it traces: an update in place would happen now, to the user's own, and never again
            if name not in parameter_proxy_cache:
                parameter_proxy_cache[name] = BufferProxy(self.create_proxy("get_attr", name, (), {}).node, self, attr_val)
            return parameter_proxy_cache[name]
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    @contextmanager
    def _scope(self, path: str) -> Iterator[None]:
        depth = len(self._scopes)
        self._scopes.append(path)
        try:
            yield
        finally:
            del self._scopes[depth:]

    def _mark(self) -> tuple[Any, ...]:
        last = next(iter(reversed(self.graph.nodes)), None)
        return last, self._namer.mark(), len(self._outputs), dict(self.module_stack), len(self._calls), self.tape.mark()

    def _roll_back(self, mark: tuple[Any, ...]) -> None:
        last, names, outputs, stack, calls, tape = mark
        self.tape.roll_back(tape)
        for node in reversed(self.graph.nodes):
            if node is last:
                break
            self.graph.erase_node(node)
            cached = self._parameter_cache.get(str(node.target))
            if cached is not None and cached.node is node:
                del self._parameter_cache[str(node.target)]
        self._namer.roll_back(names)
        del self._outputs[outputs:]
        self.module_stack.clear()
        self.module_stack.update(stack)
        for path in self._calls[calls:]:
            self.num_calls[path] -= 1
        del self._calls[calls:]


def _assigned_buffer(module: nn.Module) -> str | None:
    """The name of a buffer that a traced forward has put a proxy in the place of."""
    return next((name for name, value in module._buffers.items() if isinstance(value, fx.Proxy)), None)
