"""What ``isinstance`` answers of a value that is being traced: what stands behind it, not that it is a proxy.

A proxy is of no type that a forward asks for, so that ``if isinstance(x, torch.Tensor)`` goes the wrong way without a word, in
torch.fx's own trace too (pytorch/pytorch#43971 proposed a flag for models to ask). ``__class__`` cannot answer "Tensor": torch's
argument parser believes it, and reads the proxy's memory as a tensor's. So the modules whose forwards are traced see another
``isinstance`` meanwhile, in their globals, as torch.fx has it with the functions that it wraps.
"""

from __future__ import annotations

import builtins
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import fx, nn
from torch.fx.proxy import Attribute

from graphreg.layers import gives_tuple, is_leaf
from graphreg.operators import Operations, function_name
from graphreg.proxies import Value

ATTRIBUTES: dict[str, type] = {
    "shape": torch.Size, "dtype": torch.dtype, "device": torch.device, "layout": torch.layout, "training": bool, "is_cuda": bool,
    "requires_grad": bool, "ndim": int,
}  # fmt: skip
COMPARISONS = {"lt", "le", "eq", "ne", "gt", "ge", "not_", "contains"}
FOREIGN = sys.stdlib_module_names - {"__main__"} | {"torch", "graphreg"}  # their code is not the model's
PLAIN = {"item", "tolist"}  # methods that give what is no tensor, of a type that the data decides


@contextmanager
def answered(root: nn.Module) -> Iterator[None]:
    """Meanwhile the modules in which the model's classes stand, and the functions that these import, ask ``isinstance`` here, and so
    does ``torch.is_tensor``."""
    own = [*_homes(kind for m in root.modules() for kind in (*type(m).__mro__, vars(m).get("forward")))]
    helpers = _homes(value for home in own for value in vars(sys.modules[home]).values() if isinstance(value, FunctionType))
    changed = [place for home in {*own, *helpers, "torch"} if "isinstance" not in (place := vars(sys.modules[home]))]
    for place in changed:
        place["isinstance"] = is_of
    try:
        yield
    finally:
        for place in changed:
            del place["isinstance"]


def _homes(things: Iterable[Any]) -> Iterator[str]:
    """The names of the modules that define them, each once, without Python's own, torch and graphreg."""
    names = dict.fromkeys(getattr(thing, "__module__", None) for thing in things)
    for name in names:
        if isinstance(name, str) and isinstance(sys.modules.get(name), ModuleType) and name.partition(".")[0] not in FOREIGN:
            yield name


def is_of(value: object, kinds: Any) -> bool:
    """``isinstance``, of a value of a trace too; TypeError where what stands behind it is not known."""
    if not issubclass(type(value), (Value, Attribute)) or builtins.isinstance(value, kinds):
        return builtins.isinstance(value, kinds)
    traced: Any = value
    read = ATTRIBUTES.get(traced.attr) if type(value) is Attribute else None  # x.shape: of no node yet, and it shall get none by this
    kind = read or kind_of(traced.node, traced.tracer)
    if kind is None:
        raise TypeError(f"isinstance is asked of {traced.node.name!r}, and the trace cannot tell what that is")
    return issubclass(kind, kinds)


def kind_of(node: fx.Node, tracer: Any) -> type | None:
    """The type of a node's value: by what makes it, else by the examples; None where neither tells."""
    return _by_operation(node, tracer) or tracer.kind(node)


def _by_operation(node: fx.Node, tracer: Any) -> type | None:
    operations: Operations = tracer.operations
    module, name = operations.module(node), function_name(node)
    if node.op == "get_attr":
        owner, _, name = str(node.target).rpartition(".")
        return nn.Parameter if name in operations.modules[owner]._parameters else torch.Tensor  # getattr is traced itself
    if node.op == "placeholder" or name in PLAIN or operations.is_opaque(node):
        return None
    if gives_tuple(node, operations.modules) or operations.is_list(node) or (module is None and _gives_several(name)):
        return tuple
    if module is not None:
        return torch.Tensor if is_leaf(module) else None
    if node in tracer.sizes:
        return _number(node, name)
    return _part(node, tracer) if name == "getitem" else torch.Tensor


@cache
def _gives_several(name: str) -> bool:
    """Whether torch's operator of this name gives several tensors, whatever it is asked for: ``std_mean``, ``linalg.qr``, ``cummax``."""
    packet = getattr(torch.ops.aten, name, None) or getattr(torch.ops.aten, f"linalg_{name}", None)
    overloads = packet.overloads() if packet is not None else []
    given = [getattr(packet, overload)._schema.returns for overload in overloads if "out" not in overload]
    return bool(given) and all(len(each) > 1 or (len(each) == 1 and str(each[0].type) == "List[Tensor]") for each in given)


def _part(node: fx.Node, tracer: Any) -> type | None:
    """Of what is taken out of a value: a tensor, save of attention's tuple, whose weights may be None, and of what is not known."""
    source, index = node.args
    if not isinstance(source, fx.Node) or isinstance(index, str):
        return None
    if isinstance(tracer.operations.module(source), nn.MultiheadAttention) and index != 0:
        return None
    return torch.Tensor if _by_operation(source, tracer) is tuple or kind_of(source, tracer) is torch.Tensor else None


def _number(node: fx.Node, name: str) -> type | None:
    """Of what a size is computed into."""
    if name == "type":
        return str
    if name == "getattr":
        return ATTRIBUTES.get(str(node.args[1]))
    if name == "size":
        return torch.Size if len(node.args) + len(node.kwargs) == 1 else int
    if name == "getitem":
        return torch.Size if isinstance(node.args[1], slice) else int
    return bool if name in COMPARISONS or name.startswith("is_") else float if name == "truediv" else int
