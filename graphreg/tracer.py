"""The symbolic tracer: torch.fx's, with names for every value and leaves for what it cannot see into.

A node's names go to ``node.meta["site"]``: the path of its module and its labels. They are plain data, so that
they survive pickling, and no later stage needs the tracer again.
"""

from __future__ import annotations

import inspect
import math
import operator
import random
import re
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any

import torch
import torch.utils.checkpoint as checkpointing
from torch import fx, nn

from graphreg.errors import GraphRegError, TraceError
from graphreg.operators import IN_PLACE_NAMES, is_size
from graphreg.sites import Label


class SiteTracer(fx.Tracer):
    """Traces a module; ``leaves`` maps the paths it keeps whole to the reason, ``held`` the arguments it fixes."""

    def __init__(self, leaves: dict[str, str], held: dict[str, Any]) -> None:
        # torchvision wraps its operations as leaves in its own listing; where it is loaded, so do we, for its names.
        ops = sys.modules.get("torchvision.ops")
        super().__init__(autowrap_modules=(math, ops) if ops else (math,))  # type: ignore[arg-type]
        self.leaves, self.held = dict(leaves), held
        self._scopes = [""]
        self._namer = Namer(())
        self._outputs: list[tuple[str, str, str, Any]] = []  # (name, module path, class, value) of each module call
        self._parameter_cache: dict[str, fx.Proxy] = {}
        self._buffers: dict[int, str] = {}
        self._buffer_names: set[str] = set()
        self.sizes: set[fx.Node] = set()  # numbers and shapes
        self._region = _regions()
        self._constants: set[fx.Node] = set()  # computed from buffers alone: torchvision has no node for these

    def trace(self, root: nn.Module, concrete_args: dict[str, Any] | None = None) -> fx.Graph:  # type: ignore[override]
        self._namer = Namer({path for path, _ in root.named_modules(remove_duplicate=False) if path})
        self._buffers = {id(buffer): name for name, buffer in root.named_buffers()}
        self._buffer_names = set(self._buffers.values())
        drawn = randomness()
        with _checkpoints_refused():
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
        for name, path, kind, value in self._outputs:
            label_output(value, name, path, kind)
        return graph

    # The root is called as a user calls it: with its hooks, and with a forward set on the instance.
    # fx itself reads ``type(root).forward`` and loses both.
    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        root = self.root
        values: list[Any] = []
        keywords: list[str | None] = []
        variadic: list[int] = []
        for name, parameter in inspect.signature(root.forward).parameters.items():
            star = "*" if parameter.kind is parameter.VAR_POSITIONAL else "**" if parameter.kind is parameter.VAR_KEYWORD else ""
            default = () if parameter.default is parameter.empty else (parameter.default,)
            proxy = self.create_proxy("placeholder", star + name, default, {})
            if star:
                variadic.append(len(values))
            values.append(self.held.get(name, proxy))
            keywords.append(name if parameter.kind is parameter.KEYWORD_ONLY else None)

        def call(*given: Any) -> Any:
            flat = [(k, v) for i, (k, v) in enumerate(zip(keywords, given, strict=True)) if i not in variadic]
            rest = [given[i] for i in variadic]
            more = next((v for i, v in zip(variadic, rest, strict=True) if keywords[i] is None), ())
            return root._call_impl(  # type: ignore[no-untyped-call]
                *(v for k, v in flat if k is None), *(more if variadic else ()), **{k: v for k, v in flat if k is not None}
            )

        return call, values

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name in self.leaves or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        try:
            path = self.path_of_module(m)
        except NameError:  # made inside a forward and owned by nobody: its code is its caller's
            return forward(*args, **kwargs)
        if m._backward_hooks or m._backward_pre_hooks:
            self.leaves.setdefault(path, "it has backward hooks")
        if getattr(m, "graphreg_rules", None) is not None:
            raise GraphRegError(f"the submodule {path!r} is a rewritten module: graphreg.strip it, then regularize the whole.")
        with self._scope(path):
            if self.is_leaf_module(m, path):
                return super().call_module(m, forward, args, kwargs)
            mark, buffers, drawn = self._mark(), dict(m._buffers), randomness()
            try:
                value = super().call_module(m, forward, args, kwargs)
                if (assigned := _assigned_buffer(m)) is not None:
                    raise AttributeError(f"its forward assigns the buffer {assigned}")
                if randomness() != drawn:
                    raise AttributeError("its forward draws random numbers, which a trace would freeze")
            except GraphRegError:
                raise
            except Exception as error:  # whatever a forward raises on proxies: the module is kept whole instead
                self._roll_back(mark)
                m._buffers.update(buffers)
                restore_randomness(drawn)
                self.leaves[path] = first_line(error)
                return super().call_module(m, forward, args, kwargs)
        self._outputs.append((self._namer.module(path), path, type(m).__name__, value))
        return value

    def create_proxy(self, kind: str, target: Any, *rest: Any, **more: Any) -> fx.Proxy:
        proxy = super().create_proxy(kind, target, *rest, **more)
        if is_size(proxy.node, self.sizes.__contains__):
            self.sizes.add(proxy.node)
        if kind not in ("placeholder", "call_module") and self._is_constant(proxy.node):
            self._constants.add(proxy.node)
            proxy.node.meta["site"] = (self._scopes[-1], ())
            return proxy
        label_node(proxy.node, self._scopes[-1], self.root, self._namer)
        return proxy

    def create_arg(self, a: Any) -> Any:
        if (
            isinstance(a, dict)
            and type(a) is not dict
            and not is_dataclass(a)
            and a.__class__.__module__ != "torch.fx.immutable_collections"
        ):
            # fx makes a plain dict of an OrderedDict; the model's own type is built in the graph instead
            return self.create_node("call_function", type(a), (super().create_arg(dict(a)),), {})
        return super().create_arg(a)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return Value(node, self)

    def create_node(self, kind: str, *rest: Any, **more: Any) -> fx.Node:
        if kind not in ("placeholder", "get_attr", "output") and _regions() != self._region:
            raise RuntimeError(
                "this runs under torch.no_grad, autocast or the like, and a trace would lose that; keep it in a submodule of its own"
            )
        return super().create_node(kind, *rest, **more)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        self._parameter_cache = parameter_proxy_cache
        name = self._buffers.get(id(attr_val))
        if name is not None and isinstance(attr_val, torch.Tensor):
            # fx reads buffers while it traces: an update in place would happen now, to the user's own, and never again
            if name not in parameter_proxy_cache:
                parameter_proxy_cache[name] = BufferProxy(self.create_proxy("get_attr", name, (), {}).node, self, attr_val)
            return parameter_proxy_cache[name]
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def _is_constant(self, node: fx.Node) -> bool:
        if node.op == "get_attr":
            return node.target in self._buffer_names
        return bool(node.all_input_nodes) and all(n in self._constants for n in node.all_input_nodes)

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
        return last, self._namer.mark(), len(self._outputs), dict(self.module_stack), dict(self.num_calls)

    def _roll_back(self, mark: tuple[Any, ...]) -> None:
        last, names, outputs, stack, calls = mark
        for node in reversed(self.graph.nodes):
            if node is last:
                break
            self.graph.erase_node(node)
        for path in [path for path, proxy in self._parameter_cache.items() if proxy.node._erased]:
            del self._parameter_cache[path]
        self._namer.roll_back(names)
        del self._outputs[outputs:]
        self.module_stack.clear()
        self.module_stack.update(stack)
        self.num_calls.clear()
        self.num_calls.update(calls)


class Value(fx.Proxy):
    """A value of the graph on which ``+=`` and its like are recorded as what they are.

    Without these methods Python falls back on ``+``, and whoever holds the value by another name (a skip connection, a
    view, the caller) does not see the write: fx traces another function than the model's, without a word.
    """

    def _in_place(self, function: Callable[..., Any], other: Any) -> Any:
        if isinstance(self.tracer, SiteTracer) and self.node in self.tracer.sizes:
            return NotImplemented  # a number: Python's own fallback is right
        return self.tracer.create_proxy("call_function", function, (self, other), {})


def _add_in_place_operators() -> None:
    def method(function: Callable[..., Any]) -> Callable[[Value, Any], Any]:
        return lambda self, other: self._in_place(function, other)

    for name in IN_PLACE_NAMES:
        setattr(Value, f"__{name}__", method(getattr(operator, name)))


_add_in_place_operators()


class BufferProxy(Value):
    """A buffer in the graph, whose shape, dtype and device are still plain values."""

    def __init__(self, node: fx.Node, tracer: fx.Tracer, buffer: torch.Tensor) -> None:
        super().__init__(node, tracer)
        self.shape, self.ndim, self.dtype, self.device = buffer.shape, buffer.ndim, buffer.dtype, buffer.device

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        return self.ndim

    def numel(self) -> int:
        return self.shape.numel()

    def __len__(self) -> int:
        return self.shape[0]


def _regions() -> tuple[bool, ...]:
    """What surrounds the code that runs now and changes what its operations do."""
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *(torch.is_autocast_enabled(d) for d in ("cpu", "cuda"))


def randomness() -> tuple[Any, bytes]:
    """The state of Python's and torch's generators."""
    return random.getstate(), torch.get_rng_state().numpy().tobytes()


def restore_randomness(state: tuple[Any, bytes]) -> None:
    random.setstate(state[0])
    torch.set_rng_state(torch.frombuffer(bytearray(state[1]), dtype=torch.uint8))


@contextmanager
def _checkpoints_refused() -> Iterator[None]:
    """Activation checkpointing is traced away otherwise; the module that asks for it is kept whole instead."""
    names = ("_checkpoint_without_reentrant_generator", "CheckpointFunction")
    before = {name: getattr(checkpointing, name) for name in names if hasattr(checkpointing, name)}

    class Refused:
        apply = staticmethod(lambda *args: Refused())

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            raise RuntimeError("it checkpoints activations, which a trace would lose")

    try:
        for name in before:
            setattr(checkpointing, name, Refused)
        yield
    finally:
        for name, value in before.items():
            setattr(checkpointing, name, value)


def _assigned_buffer(module: nn.Module) -> str | None:
    """The name of a buffer that a traced forward has put a proxy in the place of."""
    return next((name for name, value in module._buffers.items() if isinstance(value, fx.Proxy)), None)


class Namer:
    """Gives each value the name torchvision gives it, save that a module's own path is always that module's."""

    def __init__(self, paths: Collection[str]) -> None:
        self._paths, self._used, self._order = paths, set[str](), list[str]()
        self._next: dict[str, int] = {}

    def module(self, path: str) -> str:
        return self._take(path) if path not in self._used else self._count(path)

    def operation(self, scope: str, base: str) -> str:
        name = f"{scope}.{base}" if scope else base
        return self._take(name) if name not in self._used and name not in self._paths else self._count(name)

    def mark(self) -> int:
        return len(self._order)

    def roll_back(self, mark: int) -> None:
        self._used.difference_update(self._order[mark:])
        del self._order[mark:]
        self._next.clear()

    def _take(self, name: str) -> str:
        self._used.add(name)
        self._order.append(name)
        return name

    def _count(self, base: str) -> str:
        count = self._next.get(base, 1)
        while (name := f"{base}_{count}") in self._used or name in self._paths:
            count += 1
        self._next[base] = count + 1
        return self._take(name)


def label_node(node: fx.Node, scope: str, root: nn.Module, namer: Namer) -> None:
    """Write the node's own label and the path of its module to ``node.meta["site"]``."""
    if node.op == "call_module":
        path = str(node.target)
        label = Label(namer.module(path), type(root.get_submodule(path)).__name__, module=path)
        scope = path
    elif node.op == "placeholder":  # by its own name: fx renames an argument that is called like a builtin
        label = Label(namer.operation("", str(node.target).lstrip("*")), "input")
    else:
        base = re.sub(r"_\d+$", "", node.name)
        op = "parameter" if node.op == "get_attr" else getattr(node.target, "__name__", str(node.target)).strip("_") or base
        if node.op == "call_function" and op in IN_PLACE_NAMES:  # ``+=`` goes by the name of ``+``, as torchvision has it
            base, op = re.sub("^i", "", base), op[1:]
        label = Label(namer.operation(scope, base), op)
    node.meta["site"] = (scope, (label,))


def label_output(value: Any, name: str, path: str, kind: str) -> None:
    """Give the value that a module returned that module's name, part by part."""
    if isinstance(value, fx.Proxy):
        add_label(value.node, Label(name, kind, module=path))
        return
    for ports, part, default in parts(value):
        if isinstance(part, fx.Proxy):
            add_label(part.node, Label(name, kind, ports, default, module=path))


def add_label(node: fx.Node, label: Label) -> None:
    scope, labels = node.meta.get("site", ("", ()))
    if label not in labels:
        node.meta["site"] = (scope, (*labels, label))


def parts(value: Any, prefix: str = "") -> Iterator[tuple[tuple[str, ...], Any, bool]]:
    """The parts of a tuple, dict, named tuple or dataclass: (ports, part, whether it is the default)."""
    if isinstance(value, dict):
        items = [(str(key), part) for key, part in value.items()]
    elif is_dataclass(value) and not isinstance(value, type):
        items = [(f.name, getattr(value, f.name)) for f in fields(value)]
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        items = list(zip(value._fields, value, strict=True))
    elif isinstance(value, (tuple, list)):
        items = [(str(i), part) for i, part in enumerate(value)]
    else:
        return
    plain = isinstance(value, (tuple, list)) and not hasattr(value, "_fields")
    for key, part in items:
        if isinstance(part, (tuple, list, dict)) or (is_dataclass(part) and not isinstance(part, type)):
            yield from parts(part, f"{prefix}{key}.")
        else:
            first = plain and not prefix and key == "0"  # what ``name`` and ``name:out`` mean
            yield ((("out", "0") if first else (prefix + key,)), part, first or prefix + key == "out")


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"[:160]
