"""The types that values of a graph surely have, by what makes them; where that leaves it open, None."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import fx, nn

from graphreg.dropouts import is_dropout_module
from graphreg.layers import STACKS, gives_tuple, is_leaf
from graphreg.operators import IN_PLACE_NAMES, PACKS, Operations, function_name

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
    if not is_leaf(module) or isinstance(module, (*STACKS, nn.AdaptiveLogSoftmaxWithLoss)) or getattr(module, "return_indices", False):
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
    given = [getattr(packet, each)._schema.returns for each in packet.overloads() if "out" not in each] if packet is not None else []
    if given and all(len(returns) == 1 and str(returns[0].type) == "Tensor" for returns in given):
        return torch.Tensor
    several = [len(returns) > 1 or (len(returns) == 1 and str(returns[0].type) == "List[Tensor]") for returns in given]
    return tuple if several and all(several) else None


def _annotated(target: Any) -> type | None:
    """By what a function of torch's says of itself."""
    torchs = str(getattr(target, "__module__", "")).startswith("torch.")
    told = getattr(target, "__annotations__", {}).get("return") if torchs else None
    return torch.Tensor if told is torch.Tensor or told == "Tensor" else None
