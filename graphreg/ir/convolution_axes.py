"""Follows the channels of a convolution from value to value: which axes of each value they are."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import prod
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules import activation, channelshuffle, dropout, padding, pixelshuffle, pooling, upsampling

from graphreg.ir.batch_norms import BATCH_NORMS
from graphreg.ir.operations import Operations, function_name, is_port, nodes_in
from graphreg.torch_internals.modules import ConvolutionBase
from graphreg.torch_internals.operators import OpOverloadPacket

CONVOLUTIONS = {"conv1d": 1, "conv2d": 2, "conv3d": 3, "conv_transpose1d": 1, "conv_transpose2d": 2, "conv_transpose3d": 3}
# The functions of Python's ``operator`` that have another name in aten: name in ``operator`` ->
# name in aten.
ATEN_NAMES = {"truediv": "div", "iadd": "add", "isub": "sub", "imul": "mul", "itruediv": "div"}
_PARTS = {"chunk", "split", "tensor_split", "split_with_sizes", "unsafe_chunk", "unsafe_split"}  # their results are tuples of parts
_RESHAPES = {"view", "reshape", "flatten", "unflatten", "view_as", "reshape_as"}
_LAYERS_KEEP_AXES = (activation, pooling, padding, dropout, upsampling, pixelshuffle, channelshuffle)


def _called_by_layers() -> Iterator[str]:
    """Yield the names of the functions of ``torch.nn.functional`` that the layers of ``_LAYERS_KEEP_AXES`` call."""
    for module in _LAYERS_KEEP_AXES:
        for kind in vars(module).values():
            forward = vars(kind).get("forward") if isinstance(kind, type) and kind is not nn.MultiheadAttention else None
            for name in forward.__code__.co_names if isinstance(forward, FunctionType) else ():
                if callable(function := getattr(nn.functional, name, None)):
                    yield from (name, function.__name__)


# Besides functions that torch's layers call. An operation on one value needs no entry if it keeps the sizes of the axes (``_tried``).
_KEEP_AXES = {
    "to", "cpu", "cuda", "type", "type_as", "narrow", "written", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "grid_sample",
    "grid_sampler", *_PARTS, *_called_by_layers(),
}  # fmt: skip

# more operations on one value that keep its axes; where shapes are known, ``_tried`` finds that out
ALSO_KEEP_AXES = {"contiguous", "clone", "detach", "float", "double", "half", "bfloat16", "flip", "roll", "cumsum", "index_select"}
_REDUCTIONS = {"mean", "sum", "amax", "amin", "logsumexp"}  # whose third argument is keepdim


@dataclass(frozen=True)
class Channels:
    """Which axes of a value are the channels of a convolution: one, or several after a reshape that splits them, as for groups.

    Attributes:
        rank: The number of dims of the value.
        axes: The axes, counted from 0, in ascending order.
    """

    rank: int
    axes: tuple[int, ...]

    @property
    def spatial(self) -> int:
        """The number of axes behind the channels; 0 if they are several axes."""
        return self.rank - 1 - self.axes[0] if len(self.axes) == 1 else 0


_INSTANCE_NORMS = nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d
_NORM_DIMS: dict[type, int] = {nn.BatchNorm2d: 4, nn.BatchNorm3d: 5, nn.InstanceNorm2d: 4, nn.InstanceNorm3d: 5}


def channels_of(node: fx.Node, operations: Operations, known: Mapping[fx.Node, Channels]) -> Channels | None:
    """Return the channels of a node's value; None if no axis is known to have a convolution's channels.

    ``known``: the channels of the values before it.
    """
    shape = shape_of(node)
    if dims := spatial_dims(node, operations):
        rank = dims + 2 if shape is None else len(shape)
        return Channels(rank, (rank - 1 - dims,))
    if shape and len(shape) == _patched_dims(node, operations):
        return Channels(len(shape), (1,))
    alike = [_broadcast(node, operand, known[operand]) for operand in operands_with_its_axes(node, operations) if operand in known]
    if found := [each for each in alike if each]:
        return max(found, key=lambda each: (each.rank, each.spatial))
    dims = len(shape) if shape is not None else _NORM_DIMS.get(type(operations.module(node)), 0)
    if dims > 2 and _is_channel_norm(node, operations):
        return Channels(dims, (1,))  # behind attention that is written out, for example
    operands = list(dict.fromkeys(nodes_in((node.args, node.kwargs))))
    if not any(operand in known for operand in operands) or operations.is_opaque(node):
        return None
    if is_port(node, operations):  # the channels of a tuple are those of each of its parts
        return known.get(operands[0])
    if operands[0] not in known:
        return _tried(node, operands, known)
    before, given = known[operands[0]], shape_of(operands[0])
    if is_linear(node, operations):  # it computes new channels from channels that are last; it mixes another axis if that is last
        return before if before.axes == (before.rank - 1,) else None
    if is_reshape(node, operations) and shape is not None and given is not None and prod(given) == prod(shape) > 0:
        return _reshaped(before, given, shape)
    return _tried(node, operands, known)


def read_channels(graph: fx.Graph, operations: Operations, known: Mapping[fx.Node, Channels]) -> dict[fx.Node, Channels]:
    """Return the channels of values that a convolution reads and that none has made, such as tokens whose axes were permuted.

    So are those that have the channels on several axes, as behind a convolution whose groups are the examples.

    Where the last axis has the units of a layer that made the value, nothing is sure: such a
    convolution may mix positions.

    Args:
        graph: A traced graph.
        operations: The operations of the graph's model.
        known: The channels of the values that a convolution has made.
    """
    found = dict[fx.Node, Channels]()
    for node in graph.nodes:
        dims, read = spatial_dims(node, operations), next(nodes_in(node.args), None)
        if not dims or read is None:
            continue
        shape = shape_of(read)
        rank = dims + 2 if shape is None else len(shape)
        channels = Channels(rank, (rank - 1 - dims,))
        alike = _alike_before(read, channels, operations)
        found |= {each: axes for each, axes in alike.items() if each not in known or len(known[each].axes) > 1}
    return found


def _alike_before(value: fx.Node, channels: Channels, operations: Operations) -> dict[fx.Node, Channels]:
    """Return a value and those from which it gets its channels, each with its channels.

    The result is empty if a layer whose units are last made one of them, and the channels are not last.
    """
    if has_units_last(value, operations):
        return {}
    alike, waiting = {value: channels}, [value]
    for each in waiting:
        for operand in nodes_in((each.args, each.kwargs)):
            if operand in alike or operand.op == "get_attr":
                continue
            rank = channels.rank if (shape := shape_of(operand)) is None else len(shape)
            tried = (Channels(rank, (axis,)) for axis in range(rank))
            found = next((axes for axes in tried if channels_of(each, operations, {operand: axes}) == alike[each]), None)
            if found is None:
                continue
            if not has_units_last(operand, operations):
                alike[operand] = found
                waiting.append(operand)
            elif found.axes != (rank - 1,):
                return {}
    return alike


def has_units_last(node: fx.Node, operations: Operations) -> bool:
    """Return whether a node is a product, such as a linear layer or a convolution, or a norm over the last axis."""
    module, is_function = operations.module(node), function_name(node) == "layer_norm" and len(node.args) > 1
    shape: Any = module.normalized_shape if isinstance(module, nn.LayerNorm) else node.args[1] if is_function else ()
    return operations.is_product(node) or (isinstance(shape, Sequence) and len(shape) == 1)


def shape_of(node: fx.Node) -> tuple[int, ...] | None:
    """Return the shape of a node's value; None if it is not known, or if the value is no tensor."""
    value = node.meta.get("value")
    return value[0] if isinstance(value, tuple) and value and isinstance(value[0], (tuple, torch.Size)) else None


def _broadcast(node: fx.Node, operand: fx.Node, before: Channels) -> Channels | None:
    """Return the channels that a value has from an operand; None if the operand is repeated along its channels, as a gate is."""
    given, made = shape_of(operand), shape_of(node)
    if given is None or made is None or not is_elementwise(node):
        return before
    more = len(made) - len(given)
    axes = tuple(axis + more for axis in before.axes)
    return Channels(len(made), axes) if all(given[axis - more] == made[axis] for axis in axes) else None


def _patched_dims(node: fx.Node, operations: Operations) -> int:
    """Return the number of dims of what gathers patches of maps, 3 for [batch, channels of a patch, patches], or makes maps of them, 4.

    0 for any other operation. ``Tensor.unfold`` is another one.
    """
    module, name = operations.module(node), function_name(node)
    if isinstance(module, nn.Unfold) or node.target is nn.functional.unfold or name == "im2col":
        return 3
    return 4 if isinstance(module, nn.Fold) or node.target is nn.functional.fold or name == "col2im" else 0


def _is_channel_norm(node: fx.Node, operations: Operations) -> bool:
    """Return whether a node is a norm that takes axis 1 for the channels, whatever computed its input."""
    is_function = operations.module(node) is None and function_name(node) in ("batch_norm", "group_norm", "instance_norm")
    return is_function or isinstance(operations.module(node), (*BATCH_NORMS, *_INSTANCE_NORMS, nn.GroupNorm))


def is_reshape(node: fx.Node, operations: Operations) -> bool:
    """Return whether a node joins axes or splits them, and keeps the order of the elements."""
    return function_name(node) in _RESHAPES or isinstance(operations.module(node), (nn.Flatten, nn.Unflatten))


def is_linear(node: fx.Node, operations: Operations) -> bool:
    """Return whether a node is a linear layer, which computes along the last axis alone."""
    return isinstance(operations.module(node), nn.Linear) or (operations.module(node) is None and function_name(node) == "linear")


def _reshaped(before: Channels, given: Sequence[int], made: Sequence[int]) -> Channels | None:
    """Return the channels of a reshaped value; None if some axis of it has channels and others together."""
    axes, i, j = list[int](), 0, 0
    while i < len(given) and j < len(made):
        # the fewest axes of both that have the same number of elements
        first, second = i, j
        i, j, sizes = i + 1, j + 1, (given[i], made[j])
        while sizes[0] != sizes[1]:
            if sizes[0] < sizes[1]:
                i, sizes = i + 1, (sizes[0] * given[i], sizes[1])
            else:
                j, sizes = j + 1, (sizes[0], sizes[1] * made[j])
        are_channels = {axis in before.axes for axis in range(first, i) if given[axis] != 1 or i - first == 1}
        if len(are_channels) == 2:
            return None
        if True in are_channels:  # an axis of size 1 beside another one has no channels
            axes += [axis for axis in range(second, j) if made[axis] != 1 or j - second == 1]
    return Channels(len(made), tuple(axes)) if axes else None


_SIZES = (1009, 1013, 1019, 1021, 1031, 1033, 1039, 1049)  # primes: no operation makes one of these from others


def _tried(node: fx.Node, operands: Sequence[fx.Node], known: Mapping[fx.Node, Channels]) -> Channels | None:
    """Return the channels of the value of an operation, such as a permutation, a mean or an index; of a tuple those of all its parts.

    The operation is tried on tensors without memory. In the values whose channels are known, and in others with as many axes, each axis
    has a size of its own, but for those of size 1.
    """
    before = next(known[operand] for operand in operands if operand in known)
    if node.op == "call_module" or before.rank > len(_SIZES):
        return None
    values: dict[fx.Node, Tensor] = {}
    for operand in operands:
        shape = shape_of(operand)
        if (shape is None and operand not in known) or (operand in known and known[operand] != before):
            return None
        if shape is None and "squeeze" in function_name(node).replace("unsqueeze", ""):
            return None
        sizes = _SIZES[: before.rank] if shape is None or len(shape) == before.rank else shape
        tried = [1 if shape is not None and shape[axis] == 1 else size for axis, size in enumerate(sizes)]
        dtype = node_value[1] if isinstance(node_value := operand.meta.get("value"), tuple) else torch.float32
        values[operand] = torch.empty(tried, dtype=dtype, device="meta")
    args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
    call: Any = getattr(Tensor, str(node.target)) if node.op == "call_method" else node.target
    try:
        made = call(*args, **kwargs)
    except Exception:  # whatever torch raises for sizes that the model never has
        return None
    first = values[next(operand for operand in operands if operand in known)]
    parts = [part for part in made if isinstance(part, Tensor)] if isinstance(made, (tuple, list)) else [made]
    found = {_axes_in(part, before, [first.shape[axis] for axis in before.axes]) if isinstance(part, Tensor) else None for part in parts}
    return found.pop() if len(found) == 1 else None


def _axes_in(made: Tensor, before: Channels, channels: Sequence[int]) -> Channels | None:
    """Return which axes of a tried operation's result have the channels. ``channels``: the sizes that these had in its argument."""
    axes = tuple(axis for axis, size in enumerate(made.shape) if size in channels and size != 1)
    others = [axis for axis, size in enumerate(made.shape) if size not in _SIZES and size != 1]
    if not axes and len(before.axes) == len(others) == 1 and made.dim() == before.rank and channels[0] != 1:
        axes = (others[0],)  # the operation took some of the channels, or joined them with others
    return Channels(made.dim(), axes) if axes else None


def spatial_dims(node: fx.Node, operations: Operations) -> int:
    """Return the number of spatial dims of a convolution; 0 for any other operation."""
    module = operations.module(node)
    return len(module.kernel_size) if isinstance(module, ConvolutionBase) else CONVOLUTIONS.get(function_name(node), 0)


def nearest(node: fx.Node, found: Callable[[fx.Node], object], operands: Callable[[fx.Node], Iterable[fx.Node]]) -> fx.Node | None:
    """Return the nearest node of which ``found`` is true, from a node back through the operands; None if there is none."""
    seen, waiting = {node}, deque([node])
    while waiting:
        node = waiting.popleft()
        if found(node):
            return node
        new = [each for each in operands(node) if each not in seen]
        seen.update(new)
        waiting += new
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
    name = function_name(node).strip("_")
    is_reduction = name in ("max", "min") and len(list(nodes_in((node.args, node.kwargs)))) < 2  # of two tensors, they are not
    return node.op in ("call_function", "call_method") and not is_reduction and _is_pointwise(name)


@cache
def _is_pointwise(name: str) -> bool:
    packet = getattr(torch.ops.aten, ATEN_NAMES.get(name, name), None) if name else None
    overloads = packet.overloads() if isinstance(packet, OpOverloadPacket) else ()  # type: ignore[no-untyped-call]
    return any(torch.Tag.pointwise in getattr(packet, overload).tags for overload in overloads)
