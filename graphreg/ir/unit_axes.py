"""Follows the units of the layer that made a value: the last axis of a linear layer or product, the channels of a convolution.

Where shapes are known, ``convolution_axes.py`` follows the axes. Where they are not, axes are counted from the end, and the few
operations that leave the last axis where it is are known here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from torch import fx, nn

from graphreg.ir.convolution_axes import (
    ALSO_KEEP_AXES,
    Channels,
    channels_of,
    has_units_last,
    is_elementwise,
    is_reshape,
    nearest,
    operands_with_its_axes,
    shape_of,
    spatial_dims,
)
from graphreg.ir.dataflow import sizes_of
from graphreg.ir.operations import Operations, function_name, is_of_einops, is_port, nodes_in, source_of
from graphreg.ir.roles import site_nodes
from graphreg.ir.train_eval import ModeGraphs

_ATTENTION = "scaled_dot_product_attention"
_COMPARES = {"cosine_similarity", "pairwise_distance", "cdist"}  # what they compute of two values has no units of a layer
_SWAPS = {"transpose", "swapaxes", "swapdims"}
# operations after which the last axis is still last, or another one is last because it is gone
_INDEX = {"getitem", "select", "squeeze", "narrow", "mean", "sum", "amax", "amin", "max", "min", "logsumexp", "expand", "unbind", "values"}


@dataclass(frozen=True)
class UnitAxes:
    """Where the units of the layer that made a value are.

    Attributes:
        axes: The axes, counted from the end: -1 is the last one. After a reshape there are several, the innermost one last, which the
            units are then said to be on: the classes in ``view(batch, anchors, classes)``. Empty if this is not known.
        rank: The number of dims of the value; 0 if it is not known.
    """

    axes: tuple[int, ...] = ()
    rank: int = 0


UNKNOWN = UnitAxes()
_GONE = UnitAxes((), -1)  # an index or a sum has taken the axis away


class UnitFinder:
    """Finds where the units of the values of graphs are. What it was asked for once, it knows."""

    def __init__(self, graphs: ModeGraphs, operations: Operations) -> None:
        self.operations = operations
        self.nodes = {name: node for graph in reversed([*graphs.values()]) for name, node in site_nodes(graph, operations).items()}
        self.known: dict[fx.Node, UnitAxes | None] = {size: None for graph in graphs.values() for size in sizes_of(graph)}

    def at(self, name: str) -> UnitAxes | None:
        """Return where the units of the layer that made a site's value are; None if no layer is between the model's inputs and it."""
        known, waiting = self.known, [self.nodes[name]]
        while waiting:
            node = waiting[-1]
            operands = [] if node in known or _is_start(node, self.operations) else list(nodes_in((node.args, node.kwargs)))
            if missing := [operand for operand in operands if operand not in known]:
                waiting += missing
                continue
            waiting.pop()
            if node in known:
                continue
            if not operands:
                known[node] = _at_start(node, self.operations)
                continue
            before = {operand: axes for operand in operands if (axes := known[operand]) is not None}
            # an operand that is repeated along an axis, as a mean or a gate is, has no say beside one that is not
            whole = {operand: axes for operand, axes in before.items() if not _is_broadcast(node, operand)}
            found = {_after(node, operand, axes, self.operations) for operand, axes in (whole or before).items()}
            known[node] = None if not before or found == {_GONE} else found.pop() if len(found) == 1 else UNKNOWN
        return known[self.nodes[name]]


def _is_start(node: fx.Node, operations: Operations) -> bool:
    """Return whether a node makes new units, or ones of which nothing is known: a layer, a product, an opaque function."""
    source = source_of(node, operations)
    if _pattern(node, operations):
        return False
    if operations.is_opaque(source) or spatial_dims(node, operations) or function_name(source) in ("written", _ATTENTION, *_COMPARES):
        return True
    is_rearranged = operations.module(source) is None and len(list(nodes_in((source.args, source.kwargs)))) == 1  # such as an einsum
    return has_units_last(source, operations) and not is_rearranged


def _at_start(node: fx.Node, operations: Operations) -> UnitAxes | None:
    source = source_of(node, operations)
    if not _is_start(node, operations) or operations.is_opaque(source) or function_name(source) in _COMPARES:
        return None
    if spatial_dims(node, operations):
        return _from_end(channels_of(node, operations, {}))
    if function_name(source) in ("written", "tensordot"):
        return UNKNOWN
    axis = _of_product(source, operations)
    return None if axis is None else UnitAxes((axis,), len(shape_of(node) or ()))


def _of_product(node: fx.Node, operations: Operations) -> int | None:
    """Return the axis, counted from the end, of what a product with weights computes; None for a product of two values, which has no units.

    It is the last axis, or that of the weights if these come first.
    """
    name, operands = function_name(node), list(nodes_in((node.args, node.kwargs)))
    if operations.module(node) is not None or name not in ("matmul", "__matmul__", "bmm", "mm", "einsum"):
        return -1
    of_data = [nearest(each, lambda n: n.op == "placeholder", lambda n: n.all_input_nodes) for each in operands]
    if name == "einsum" and isinstance(node.args[0], str) and "->" in node.args[0]:
        given, made = node.args[0].replace(" ", "").split("->")
        letters = dict(zip(operands, given.split(","), strict=False))
        data = "".join(letters[each] for each, read in zip(operands, of_data, strict=True) if read is not None)
        new = [made.index(letter) - len(made) for letter in "".join(letters.values()) if letter in made and letter not in data]
        return new[-1] if new else None
    return None if all(of_data) else -2 if of_data[0] is None else -1


def _from_end(channels: Channels | None) -> UnitAxes | None:
    return None if channels is None else UnitAxes(tuple(axis - channels.rank for axis in channels.axes), channels.rank)


def _after(node: fx.Node, operand: fx.Node, before: UnitAxes, operations: Operations) -> UnitAxes:
    """Return where the units of an operand are after an operation."""
    name, shape, given = function_name(node), shape_of(node), shape_of(operand)
    if before == UNKNOWN:
        return UNKNOWN
    pattern = _pattern(node, operations)
    by_name = _rearranged(pattern, before) if pattern else _by_name(node, operand, before, operations)
    if by_name.axes:
        by_name = replace(by_name, rank=len(shape or ()))
    if pattern or not before.rank or (shape is None and given is not None):
        return by_name

    def followed(axes: tuple[int, ...]) -> UnitAxes | None:
        channels = Channels(before.rank, tuple(sorted(axis + before.rank for axis in axes)))
        return _from_end(channels_of(node, operations, {operand: channels}))

    whole, inner = followed(before.axes), followed(before.axes[-1:])
    if whole is not None and (inner is None or len(inner.axes) > 1):
        return whole  # the reshape has joined all axes to one, or has split the one that there was
    if whole is not None and inner is not None:
        return UnitAxes((*(axis for axis in whole.axes if axis not in inner.axes), *inner.axes), whole.rank)
    if inner is not None:
        return inner
    if name in _INDEX and shape is not None and given is not None and len(shape) < len(given):
        return _GONE
    return by_name if name in _INDEX or is_reshape(node, operations) else UNKNOWN


def _is_broadcast(node: fx.Node, operand: fx.Node) -> bool:
    """Return whether an elementwise operation repeats an operand along an axis; False if the shapes are not known."""
    given, shape = shape_of(operand), shape_of(node)
    return is_elementwise(node) and given is not None and shape is not None and given[::-1] != shape[: -len(given) - 1 : -1]


def _pattern(node: fx.Node, operations: Operations) -> str:
    """Return the pattern of a rearrangement by einops; ``""`` if the node is none."""
    module = operations.module(node)
    if module is None:
        pattern = node.args[1] if function_name(node) == "rearrange" and is_of_einops(node) and len(node.args) > 1 else ""
    else:
        pattern = getattr(module, "pattern", "") if type(module).__name__ == "Rearrange" and is_of_einops(node, module) else ""
    return pattern if isinstance(pattern, str) else ""


def _rearranged(pattern: str, before: UnitAxes) -> UnitAxes:
    """Return where the units are after a rearrangement by einops: ``"b (h d) t -> b t h d"``."""
    given, made = ([group.strip("()").split() for group in re.findall(r"\([^)]*\)|[^\s()]+", side)] for side in pattern.split("->"))
    axis = before.axes[-1]
    if -axis > len(given) or "..." in (name for group in given[axis:] for name in group) or not given[axis]:
        return UNKNOWN
    units = given[axis][-1]
    places = [i - len(made) for i, group in enumerate(made) if units in group]
    behind = [name for group in made[places[0] :] for name in group] if places else ["..."]
    whole = bool(places) and (made[places[0]] == [units] or made[places[0]] == given[axis])
    return UnitAxes((places[0],)) if whole and "..." not in behind else UNKNOWN


def _by_name(node: fx.Node, operand: fx.Node, before: UnitAxes, operations: Operations) -> UnitAxes:
    """Return where the units are after an operation, as far as that is known without shapes."""
    name, rest = function_name(node), [*node.args[1:], *node.kwargs.values()]
    name = str(rest[0]) if name == "getattr" else name  # ``x.mT``, ``x.max(1).values``
    last = UnitAxes((-1,)) if before.axes == (-1,) else UNKNOWN
    if operand in operands_with_its_axes(node, operations):
        return UnitAxes(before.axes)
    if name in ("t", "mT", "mH") or (name in _SWAPS and {*rest} == {-1, -2}):
        return UnitAxes(tuple({-1: -2, -2: -1}.get(axis, axis) for axis in before.axes))
    if name in _SWAPS and {*rest} == {0, 1}:
        return last
    if name in ("squeeze", "mean", "sum", "amax", "amin", "logsumexp") and rest[:1] == [-1] and before.axes == (-1,):
        return _GONE
    if name in ("stack", "unsqueeze", "unsqueeze_"):
        return last if rest in ([], [0], [1]) else UNKNOWN
    if is_reshape(node, operations) and _made_dims(node, operations) == 2:
        return UnitAxes((-1,))  # of [batch, units], however many axes were joined
    if name == "getitem" and isinstance(rest[0], tuple) and rest[0][-1:] == (None,):
        return UNKNOWN
    keeps = name in _INDEX or name in ALSO_KEEP_AXES or is_reshape(node, operations) or is_port(node, operations)
    return last if keeps else UNKNOWN


def _made_dims(node: fx.Node, operations: Operations) -> int:
    """Return the number of dims that a reshape makes; 0 if it is not known without shapes."""
    name, module, rest = function_name(node), operations.module(node), list(node.args[1:])
    if (shape := shape_of(node)) is not None:
        return len(shape)
    if isinstance(module, nn.Flatten) or name == "flatten":
        axes = (module.start_dim, module.end_dim) if isinstance(module, nn.Flatten) else (*rest, -1)[:2]
        return 2 if axes == (1, -1) else 0
    sizes = rest[0] if len(rest) == 1 and isinstance(rest[0], (tuple, list)) else rest
    return len(sizes) if name in ("view", "reshape") and not node.kwargs else 0
