"""The types that values of a graph surely have, by what makes them; where that leaves it open, None."""
from __future__ import annotations

import builtins
import functools
import sys
import types
import typing
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import fx, nn
from torch.fx.proxy import Attribute

from graphreg.ir import IN_PLACE_NAMES, PACKS, STACKS, Operations, function_name, gives_tuple, is_dropout_module, is_single_operation
from graphreg.torch_internals import Changes, forward_hooks, schema_of
from graphreg.tracing.symbolic.proxies import FOREIGN, Value

ATTRIBUTES: dict[str, type] = {
    "shape": torch.Size, "dtype": torch.dtype, "device": torch.device, "layout": torch.layout, "is_cuda": bool, "requires_grad": bool,
    "ndim": int,
}  # fmt: skip
INTEGERS = {"add", "sub", "mul", "floordiv", "mod", "neg", "pos"}  # of integers, again one
COUNTS = {"dim", "ndimension", "numel", "nelement", "len", "element_size"}
ORDER = {"lt", "le", "eq", "ne", "gt", "ge"}
FLAGS = ORDER | {"not_", "contains", "is_floating_point", "is_complex", "is_contiguous"}  # of sizes and of tensors' settings
OPERATORS = ORDER | set(IN_PLACE_NAMES) | {
    "add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "neg", "and_", "or_", "xor", "invert", "abs",
}  # fmt: skip  # of a tensor and whatever else they give a tensor
SEVERAL = {"return_indices", "as_tuple", "return_inverse", "return_counts"}  # options by which one tensor becomes several


def surely(node: fx.Node, tracer: Any) -> type | None:
    """The type of a node's value. ``tracer``: with its ``operations``, ``sizes`` and arguments' ``kind``."""
    operations: Operations = tracer.operations
    module, name = operations.module(node), function_name(node)
    if node.op == "get_attr":
        owner, _, name = str(node.target).rpartition(".")
        return nn.Parameter if name in operations.modules[owner]._parameters else torch.Tensor
    if node.op == "placeholder" or operations.is_opaque(node):
        return None
    if module is not None:
        return _of_layer(node, module, tracer)
    if name in ("getitem", "__getitem__"):
        return _of_part(node, tracer)
    if name in FLAGS and node in tracer.sizes:
        return bool
    if node in tracer.sizes:
        return _of_size(node, name, tracer)
    if any(node.kwargs.get(option) for option in SEVERAL):
        return None
    if node.op == "call_method" and not is_tensor(node.args[0], tracer):
        return None
    if getattr(node.target, "__module__", "") in ("_operator", "builtins", "math"):
        return torch.Tensor if name in OPERATORS and any(is_tensor(a, tracer) for a in node.args) else None
    if operations.is_list(node):
        return tuple
    if name == "where" and len(node.args) + len(node.kwargs) > 1:  # of a condition alone it gives indices
        return torch.Tensor
    return _returned(name) or _annotated(node.target)


def is_tensor(value: Any, tracer: Any) -> bool:
    if not isinstance(value, fx.Node):
        return False
    kind = tracer.kind(value) if value.op == "placeholder" else surely(value, tracer)
    return kind is not None and issubclass(kind, torch.Tensor)


def _of_layer(node: fx.Node, module: nn.Module, tracer: Any) -> type | None:
    if gives_tuple(node, tracer.operations.modules):
        return tuple
    if isinstance(module, nn.Identity) or is_dropout_module(module):  # what they are given they may give back
        return torch.Tensor if is_tensor(node.args[0] if node.args else None, tracer) else None
    several = isinstance(module, (*STACKS, nn.AdaptiveLogSoftmaxWithLoss)) or getattr(module, "return_indices", False)
    if not is_single_operation(module) or several:
        return None
    return torch.Tensor


def _of_part(node: fx.Node, tracer: Any) -> type | None:
    """Of what is taken out of a value: of a tensor, a tensor; of torch's tuples too, save attention's weights and packed sequences."""
    source, index = node.args
    if not isinstance(source, fx.Node) or isinstance(index, (str, fx.Node)):
        return None
    if is_tensor(source, tracer):
        return torch.Tensor
    if source in tracer.sizes:
        return (torch.Size if isinstance(index, slice) else int) if surely(source, tracer) is torch.Size else None
    if gives_tuple(node, tracer.operations.modules):
        return tuple
    if surely(source, tracer) is not tuple:
        return None
    if isinstance(index, slice):
        return tuple
    layer = tracer.operations.module(source)
    packed = layer is not None and any(function_name(given) in PACKS for given in source.all_input_nodes)
    return None if packed or (isinstance(layer, nn.MultiheadAttention) and index != 0) else torch.Tensor


def _of_size(node: fx.Node, name: str, tracer: Any) -> type | None:
    if name == "getattr":
        return ATTRIBUTES.get(str(node.args[1])) if is_tensor(node.args[0], tracer) else None
    if name in COUNTS:
        return int
    if name == "size":
        return torch.Size if len(node.args) + len(node.kwargs) == 1 else int
    if name == "type":
        return str
    whole = [type(a) is int or (isinstance(a, fx.Node) and surely(a, tracer) is int) for a in node.args]
    return None if not all(whole) else int if name in INTEGERS else float if name == "truediv" else None


@cache
def _returned(name: str) -> type | None:
    """By the schemas of torch's operator of this name: a tensor, or a tuple, where all its overloads agree."""
    packet = getattr(torch.ops.aten, name, None)
    given = [schema_of(getattr(packet, each)).returns for each in packet.overloads() if "out" not in each] if packet is not None else []
    if given and all(len(returns) == 1 and str(returns[0].type) == "Tensor" for returns in given):
        return torch.Tensor
    several = [len(returns) > 1 or (len(returns) == 1 and str(returns[0].type) == "List[Tensor]") for returns in given]
    return tuple if several and all(several) else None


def _annotated(target: Any) -> type | None:
    """By what a function of torch's says of itself."""
    torchs = str(getattr(target, "__module__", "")).startswith("torch.")
    told = getattr(target, "__annotations__", {}).get("return") if torchs else None
    return torch.Tensor if told is torch.Tensor or told == "Tensor" else None



Globals = dict[str, Any]


def places_of(root: nn.Module) -> list[Globals]:
    """The globals of the model's code: of its classes, hooks and functions, and of what these import of the same packages."""
    return _reached(_code_of(root))


@contextmanager
def answered(places: Iterable[Globals]) -> Iterator[None]:
    """Meanwhile the model's code, which has these globals, asks ``isinstance`` here, and so does ``torch.is_tensor``."""
    changed = [place for place in (*places, vars(torch)) if "isinstance" not in place]
    with Changes() as changes, changes:
        for place in changed:
            changes.put(place, "isinstance", is_of)
        yield


def _code_of(root: nn.Module) -> Iterator[Any]:
    """The functions that run when the model does, and what may hold some: its classes, their bases, hooks, what is set on it."""
    seen: dict[type, None] = {}
    for module in root.modules():
        seen.update(dict.fromkeys(type(module).__mro__))
        yield from forward_hooks(module)
        yield from (value for value in vars(module).values() if callable(value))
    for kind in seen:
        yield from vars(kind).values()


def _reached(code: Iterable[Any]) -> list[Globals]:
    """The globals of functions, and of the modules and functions that stand in them and belong to the same package."""
    found: dict[int, Globals] = {}
    waiting = [place for thing in code if (place := _globals_of(thing)) is not None]
    imported = [place for own in waiting for thing in list(own.values()) if (place := _globals_of(thing)) is not None]
    packages = {_package(place) for place in (*waiting, *imported)}
    while waiting:
        place = waiting.pop()
        if id(place) in found:
            continue
        found[id(place)] = place
        held = [vars(v) if isinstance(v, types.ModuleType) else _globals_of(v) for v in list(place.values())]
        waiting += [h for h in held if h is not None and id(h) not in found and (_package(h) in packages or _is_file(h))]
    return list(found.values())


def _is_file(place: Globals) -> bool:
    """A module of no package, such as the files beside a script."""
    return "__path__" not in place and "." not in str(place.get("__name__", ".")) and _package(place) not in FOREIGN


def _globals_of(thing: Any) -> Globals | None:
    """Of a function inside partials, methods and decorators, or of a class by the module that defines it; None for others' code."""
    while isinstance(thing, (functools.partial, types.MethodType, staticmethod, classmethod, property)):
        thing = thing.func if isinstance(thing, functools.partial) else getattr(thing, "__func__", None) or getattr(thing, "fget", None)
    thing = getattr(thing, "__wrapped__", thing)
    if isinstance(thing, types.FunctionType):
        place: Globals | None = thing.__globals__
    else:
        home = sys.modules.get(thing.__module__) if isinstance(thing, type) else None
        place = vars(home) if isinstance(home, types.ModuleType) else None
    return place if place is not None and _package(place) not in FOREIGN else None


def _package(place: Globals) -> str:
    return str(place.get("__name__", "")).partition(".")[0]


def is_of(value: object, kinds: Any) -> bool:
    """``isinstance``, of a value of a trace too; TypeError where what stands behind it is not known."""
    if not issubclass(type(value), (Value, Attribute)):
        return builtins.isinstance(value, kinds)
    traced: Any = value
    if (
        issubclass(type(value), Attribute) and traced.attr in ATTRIBUTES and is_tensor(traced.root.node, traced.tracer)
    ):  # it gets no node by this
        return _is(ATTRIBUTES[traced.attr], kinds, traced.attr)
    kind = surely(traced.node, traced.tracer)
    if kind is None and (kind := traced.tracer.kind(traced.node)) is None:
        raise TypeError(f"isinstance is asked of {traced.node.name!r}, and the trace cannot tell what that is")
    return _is(kind, kinds, traced.node.name)


def _is(kind: type, kinds: Any, name: str) -> bool:
    if builtins.isinstance(kinds, tuple):
        return any(_is(kind, each, name) for each in kinds)
    if typing.get_origin(kinds) in (types.UnionType, typing.Union):
        return any(_is(kind, each, name) for each in typing.get_args(kinds))
    plain = kinds is None or kinds is nn.Parameter or getattr(type(kinds), "__instancecheck__", None) == type.__instancecheck__
    if not plain and not hasattr(kinds, "_abc_impl") and issubclass(kind, torch.Tensor):
        raise TypeError(f"isinstance is asked of {name!r}, for {kinds!r}, and the trace cannot tell whether the tensor is one")
    return issubclass(kind, type(None) if kinds is None else kinds)
