"""Determines which values still have the axes of a convolution's output: batch, channels, then the spatial axes."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from functools import cache
from types import FunctionType
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules import activation, dropout, padding, pooling, upsampling

from graphreg.ir.operations import Operations, function_name, nodes_in
from graphreg.torch_internals.modules import ConvolutionBase
from graphreg.torch_internals.operators import OpOverloadPacket

CONVOLUTIONS = {"conv1d": 1, "conv2d": 2, "conv3d": 3, "conv_transpose1d": 1, "conv_transpose2d": 2, "conv_transpose3d": 3}
# The functions of Python's ``operator`` that have another name in aten: name in ``operator`` ->
# name in aten.
ATEN_NAMES = {"truediv": "div", "iadd": "add", "isub": "sub", "imul": "mul", "itruediv": "div"}
_PARTS = {"chunk", "split", "tensor_split", "split_with_sizes", "unsafe_chunk", "unsafe_split"}  # their results are tuples of parts
_LAYERS_KEEP_AXES = (activation, pooling, padding, dropout, upsampling)


def _called_by_layers() -> Iterator[str]:
    """Yield the names of the functions of ``torch.nn.functional`` that the layers of ``_LAYERS_KEEP_AXES`` call."""
    for module in _LAYERS_KEEP_AXES:
        for kind in vars(module).values():
            forward = vars(kind).get("forward") if isinstance(kind, type) and kind is not nn.MultiheadAttention else None
            for name in forward.__code__.co_names if isinstance(forward, FunctionType) else ():
                if callable(function := getattr(nn.functional, name, None)):
                    yield from (name, function.__name__)


_KEEP_AXES = {
    "clone", "contiguous", "to", "float", "double", "half", "bfloat16", "type", "type_as", "detach", "roll", "flip", "narrow", "cumsum",
    "normalize", "written", "repeat_interleave", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "grid_sample", "grid_sampler",
    *_PARTS, *_called_by_layers(),
}  # fmt: skip

_REDUCTIONS = {"mean", "sum", "amax", "amin", "logsumexp"}  # whose third argument is keepdim


def spatial_dims(node: fx.Node, operations: Operations) -> int:
    """Return the number of spatial dims of a convolution; 0 for any other operation."""
    module = operations.module(node)
    return len(module.kernel_size) if isinstance(module, ConvolutionBase) else CONVOLUTIONS.get(function_name(node), 0)


def convolution(node: fx.Node, operations: Operations) -> tuple[str, int] | None:
    """Find the convolution whose axes a value still has. Return its name and its number of spatial dims; None if there is none.

    The name is the path of the layer or the name of the function.
    """
    seen, waiting = set[fx.Node](), [node]
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if dims := spatial_dims(node, operations):
            return str(node.target) if operations.module(node) is not None else function_name(node), dims
        waiting += operands_with_its_axes(node, operations)
    return None


def operands_with_its_axes(node: fx.Node, operations: Operations) -> Iterator[fx.Node]:
    """Yield the operands that have the same axes as the node's value."""
    module, name = operations.module(node), function_name(node)
    if operations.is_opaque(node):  # a user's function may have the name of a function of torch
        return
    # ``x[:, :, ::2]`` keeps the axes; ``x[0]`` and ``x[:, None]`` do not, unless ``x`` is a tuple of parts
    index: Any = node.args[1] if name == "getitem" else None
    slices = all(isinstance(part, slice) or part is ... for part in (index if isinstance(index, Sequence) else (index,)))
    slices = slices or (isinstance(index, int) and isinstance(node.args[0], fx.Node) and function_name(node.args[0]) in _PARTS)
    if is_elementwise(node) or name in ("cat", "concat", "concatenate"):
        yield from nodes_in((node.args, node.kwargs))
    elif (
        operations.is_norm(node) or operations.is_dropout(node) or isinstance(module, nn.Identity) or name in _KEEP_AXES or "pool" in name
        or (sys.modules.get(type(module).__module__) in _LAYERS_KEEP_AXES and not isinstance(module, nn.MultiheadAttention))
        or slices or node.kwargs.get("keepdim") is True or (name in _REDUCTIONS and len(node.args) > 2 and node.args[2] is True)
    ):  # fmt: skip
        yield from list(nodes_in(node.args))[:1]


def is_elementwise(node: fx.Node) -> bool:
    """Return whether each element of the result depends only on the operands' elements at the same place.

    torch tags such operators as pointwise.
    """
    return node.op in ("call_function", "call_method") and _is_pointwise(function_name(node).strip("_"))


@cache
def _is_pointwise(name: str) -> bool:
    packet = getattr(torch.ops.aten, ATEN_NAMES.get(name, name), None) if name else None
    overloads = packet.overloads() if isinstance(packet, OpOverloadPacket) else ()  # type: ignore[no-untyped-call]
    return any(torch.Tag.pointwise in getattr(packet, overload).tags for overload in overloads)
