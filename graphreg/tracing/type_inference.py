"""Infers the types of a graph's values from the operations that make them."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from graphreg.ir.operations import (
    IN_PLACE_NAMES,
    PACKS,
    STACKS,
    Operations,
    function_name,
    gives_tuple,
    is_dropout_module,
    is_of_einops,
    is_single_operation,
    results,
)

ATTRIBUTES: dict[str, type] = {
    "shape": torch.Size, "dtype": torch.dtype, "device": torch.device, "layout": torch.layout, "is_cuda": bool, "requires_grad": bool,
    "ndim": int,
}  # fmt: skip
# operators that return an integer if all arguments are integers
INTEGERS = {"add", "sub", "mul", "floordiv", "mod", "neg", "pos"}
COUNTS = {"dim", "ndimension", "numel", "nelement", "len", "element_size"}
ORDER = {"lt", "le", "eq", "ne", "gt", "ge"}
# operations whose result is a tensor or a bool
FLAGS = ORDER | {"not_", "contains", "is_floating_point", "is_complex", "is_contiguous"}
OPERATORS = ORDER | set(IN_PLACE_NAMES) | {
    "add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "neg", "and_", "or_", "xor", "invert", "abs",
}  # fmt: skip  # operators that return a tensor if an argument is a tensor
# keywords that say into how many parts
_PARTS = ("chunks", "split_size_or_sections", "split_size", "split_sizes")
# options that make an operation return several tensors
SEVERAL = {"return_indices", "as_tuple", "return_inverse", "return_counts"}


def definite_type(node: fx.Node, tracer: Any) -> type | None:
    """Return the type that a node's value must have; None if the operation does not determine it.

    Args:
        node: The node.
        tracer: A ``SiteTracer``, which has ``operations``, ``sizes`` and ``kind``.
    """
    operations: Operations = tracer.operations
    module, name = operations.module(node), function_name(node)
    if node.op == "get_attr":
        owner, _, name = str(node.target).rpartition(".")
        return nn.Parameter if name in operations.modules[owner]._parameters else torch.Tensor
    if node.op == "placeholder" or operations.is_opaque(node):
        return None
    if is_of_einops(node, module):
        return {"pack": tuple, "unpack": list, "parse_shape": dict}.get(name, torch.Tensor)
    if module is not None:
        return _type_from_layer(node, module, tracer)
    if name in ("getitem", "__getitem__"):
        return _type_of_item(node, tracer)
    if name in FLAGS and node in tracer.sizes:
        return bool
    if node in tracer.sizes:
        return _type_of_size(node, name, tracer)
    if operations.is_list(node):
        return tuple
    if any(node.kwargs.get(option) for option in SEVERAL):
        return None
    if node.op == "call_method" and not is_tensor(node.args[0], tracer):
        return None
    if getattr(node.target, "__module__", "") in ("_operator", "builtins", "math"):
        return torch.Tensor if name in OPERATORS and any(is_tensor(a, tracer) for a in node.args) else None
    # with only a condition, ``where`` returns a tuple of indices
    if name == "where" and len(node.args) + len(node.kwargs) > 1:
        return torch.Tensor
    return torch.Tensor if results(node) == 1 else None


def fixed_count(node: fx.Node, operations: Operations) -> int | None:
    """Return how many items a node's value has whatever the inputs; None if the operation does not determine it."""
    name = function_name(node)
    if gives_tuple(node, operations.modules) or (name == "pack" and is_of_einops(node)):
        return 2
    if operations.module(node) is not None or operations.is_opaque(node):
        return None
    parts = node.args[1] if len(node.args) > 1 else next((node.kwargs[each] for each in _PARTS if each in node.kwargs), None)
    if name == "chunk" and isinstance(parts, int):
        return parts  # or fewer, and then the graph fails where it takes the last one
    if name in ("split", "split_with_sizes") and isinstance(parts, (tuple, list)):
        return len(parts)
    count = results(node)
    return count if count and count > 1 else None


def is_shape(node: Any) -> bool:
    """Return whether a value is the whole shape of a tensor, ``x.shape`` or ``x.size()``."""
    if not isinstance(node, fx.Node):
        return False
    called = node.op == "call_method" and node.target == "size" and len(node.args) + len(node.kwargs) == 1
    return called or (node.target is getattr and node.args[1] == "shape")


def is_tensor(value: Any, tracer: Any) -> bool:
    """Return whether an argument of a node is itself a node whose value must be a tensor."""
    if not isinstance(value, fx.Node):
        return False
    kind = tracer.kind(value) if value.op == "placeholder" else definite_type(value, tracer)
    return kind is not None and issubclass(kind, torch.Tensor)


def _type_from_layer(node: fx.Node, module: nn.Module, tracer: Any) -> type | None:
    """Return the type of a layer's result."""
    if tracer.operations.is_list(node):
        return tuple
    # such a layer may return its input, whatever that is
    if isinstance(module, nn.Identity) or is_dropout_module(module):
        return torch.Tensor if is_tensor(node.args[0] if node.args else None, tracer) else None
    return None if isinstance(module, STACKS) or not is_single_operation(module) else torch.Tensor


def _type_of_item(node: fx.Node, tracer: Any) -> type | None:
    """Return the type of an item of a value.

    An item of a tensor is a tensor. So is an item of a tuple that torch returns, except in two
    cases: attention weights may be None, and a recurrent layer that gets a packed sequence returns
    one.
    """
    source, index = node.args
    if not isinstance(source, fx.Node) or isinstance(index, (str, fx.Node)):
        return None
    if is_tensor(source, tracer):
        return torch.Tensor
    if source in tracer.sizes:
        return (torch.Size if isinstance(index, slice) else int) if definite_type(source, tracer) is torch.Size else None
    if tracer.operations.is_list(node):
        return tuple
    if definite_type(source, tracer) is not tuple:
        return None
    if isinstance(index, slice):
        return tuple
    layer = tracer.operations.module(source)
    packed = layer is not None and any(function_name(each) in PACKS for each in source.all_input_nodes)
    return None if packed or (isinstance(layer, nn.MultiheadAttention) and index != 0) else torch.Tensor


def _type_of_size(node: fx.Node, name: str, tracer: Any) -> type | None:
    """Return the type of a size, of an attribute of a tensor, or of arithmetic on sizes."""
    if name == "getattr":
        return ATTRIBUTES.get(str(node.args[1])) if is_tensor(node.args[0], tracer) else None
    if name in COUNTS:
        return int
    if name == "size":
        return torch.Size if len(node.args) + len(node.kwargs) == 1 else int
    if name == "type":
        return str
    are_integers = [type(a) is int or (isinstance(a, fx.Node) and definite_type(a, tracer) is int) for a in node.args]
    return None if not all(are_integers) else int if name in INTEGERS else float if name == "truediv" else None
