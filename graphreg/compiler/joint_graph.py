"""Passes on the joint graph of forward and backward, for penalties that differentiate the model.

They run before the graph is partitioned into forward and backward. On a CPU, second derivatives
cost more than their arithmetic, for five reasons:

- torch computes the sums in batch norm's second derivative one axis at a time
  (``sum_exclude_dim1``). Inductor stores each partial sum and cannot fuse the sums. ``merge_sums``
  merges them.
- Some of these sums equal sums of the first derivative, but common-subexpression elimination
  (``fx_graph_cse``) does not notice: the graph of the first derivative sums with ``keepdim``, and
  uses other operations to give the statistics four axes. ``same_forms`` writes the sums of both
  derivatives in one form, so that equal sums are merged.
- The mask of a ReLU (``output <= 0``) is needed in the penalty's vector-Jacobian product (vjp), in
  the derivative of the vjp, and in the backward of the loss. A partitioner that minimizes bytes
  saves the mask for backward, as a bool tensor. On a CPU, Inductor needs 12 ns to store a bool, and
  0.1 ns to store a float. ``recompute_masks`` makes backward recompute the mask from the ReLU's
  output, which is saved in any case. Eager does the same.
- The vjp brings ``convolution_backward`` into the forward graph. Inductor gives all inputs of this
  operator the memory layout that they have in eager (channels first), while the convolutions around
  it use another layout, so the values are copied between layouts. A ``convolution`` needs no such
  copies. ``input_gradients`` replaces ``convolution_backward`` by a ``convolution``.
- In the derivative of the vjp, torch computes the gradient of a convolution's weight as a
  convolution of transposed values (``_convolution_double_backward``), and copies the values to
  transpose them. ``weight_gradients`` replaces that convolution by ``convolution_backward``, which
  needs no copy.

The passes write sizes into the graph. So they leave operations alone whose sizes are symbols, as
with ``dynamic=True``.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

aten = torch.ops.aten
_COMPARISONS = {getattr(aten, name).Scalar for name in ("le", "lt", "ge", "gt", "eq", "ne")}


def simplify(graph: fx.Graph) -> None:
    """Apply every pass of this file to a joint graph, in place."""
    merge_sums(graph)
    same_forms(graph)
    input_gradients(graph)
    weight_gradients(graph)
    recompute_masks(graph)


def merge_sums(graph: fx.Graph) -> int:
    """Merge ``sum(sum(x, a), b)`` into one sum if nothing else reads the inner sum. Return how many were merged."""
    count = 0
    for node in list(graph.find_nodes(op="call_function", target=aten.sum.dim_IntList)):
        inner = node.args[0]
        while isinstance(inner, fx.Node) and inner.target is aten.sum.dim_IntList and _merges(inner, node):
            keepdim = _keepdim(node)
            rank = _value(inner.args[0]).dim()
            # The axes of the outer sum are numbered without those that the inner sum has removed.
            first = {d % rank for d in inner.args[1]}  # type: ignore[union-attr]
            left = list(range(rank)) if keepdim else [d for d in range(rank) if d not in first]
            dims = sorted(first | {left[d % len(left)] for d in node.args[1]})
            node.args = (inner.args[0], dims, keepdim)
            graph.erase_node(inner)
            inner, count = node.args[0], count + 1
    return count


def same_forms(graph: fx.Graph) -> int:
    """Replace each way to add axes of length 1 (``unsqueeze``, ``keepdim``) by a ``view``. Return how many nodes were replaced."""
    count = 0
    # in reverse: when the last of several ``unsqueeze`` is replaced, nothing reads the others
    for node in reversed(list(graph.nodes)):
        value, base = _value(node), node
        while base.target is aten.unsqueeze.default:
            base = base.args[0]
        if base is not node and not node.users:
            graph.erase_node(node)
            continue

        sums = node.target is aten.sum.dim_IntList and not node.kwargs and _keepdim(node)
        if not isinstance(value, torch.Tensor) or not (sums or (base is not node and _value(base).dim() == 1)) or not _fixed(node):
            continue

        with graph.inserting_before(node):
            if sums:
                base = graph.call_function(node.target, node.args[:2])
                base.meta.update(node.meta, val=value.squeeze([d % value.dim() for d in node.args[1]]))
            view = graph.call_function(aten.view.default, (base, list(value.shape)))

        view.meta.update(node.meta)
        node.replace_all_uses_with(view)
        graph.erase_node(node)
        count += 1
    return count


def _merges(inner: fx.Node, outer: fx.Node) -> bool:
    # A keyword is a dtype, in which the other sum might not add. An empty list means all axes.
    plain = not inner.kwargs and not outer.kwargs and len(inner.users) == 1
    return plain and bool(inner.args[1]) and bool(outer.args[1]) and _keepdim(inner) == _keepdim(outer)


def _keepdim(node: fx.Node) -> bool:
    return len(node.args) > 2 and bool(node.args[2])


def _fixed(*nodes: Any) -> bool:
    """Return whether all sizes of the nodes' values are numbers, not symbols."""
    return all(isinstance(size, int) for node in nodes for size in _value(node).shape)


def _value(node: Any) -> Any:
    return node.meta.get("val") if isinstance(node, fx.Node) else None


def input_gradients(graph: fx.Graph) -> int:
    """Replace each ``convolution_backward`` that computes only the input's gradient by a transposed convolution.

    Return how many were replaced.
    """
    count = 0
    for node in list(graph.find_nodes(op="call_function", target=aten.convolution_backward.default)):
        g, x, weight, _, strides, padding, dilations, transposed, _, groups, mask = node.args
        if list(mask) != [True, False, False] or transposed or not _fixed(x, weight, g):
            continue
        sizes, kernel, outputs = (_value(n).shape[2:] for n in (x, weight, g))
        axes = zip(sizes, kernel, outputs, strides, padding, dilations, strict=True)
        # With a stride, several input sizes give one output size. ``missing`` tells the transposed
        # convolution by how much the input was larger than the smallest of these.
        missing = [size - ((out - 1) * s - 2 * p + d * (k - 1) + 1) for size, k, out, s, p, d in axes]
        with graph.inserting_before(node):
            options = (None, strides, padding, dilations, True, missing, groups)
            result = graph.call_function(aten.convolution.default, (g, weight, *options))
        # ``convolution_backward`` returns a tuple, and by the mask only its first item is read.
        for item in list(node.users):
            result.meta.update(item.meta)
            item.replace_all_uses_with(result)
        count += 1
    graph.eliminate_dead_code()
    return count


def weight_gradients(graph: fx.Graph) -> int:
    """Replace each ``transpose(convolution(transpose(x), transpose(g)))`` by the ``convolution_backward`` that equals it.

    Return how many were replaced.
    """
    count = 0
    for node in list(graph.find_nodes(op="call_function", target=aten.convolution.default)):
        x, g, bias, strides, padding, dilations, transposed, _, groups = node.args
        x, g = _untransposed(x), _untransposed(g)
        if x is None or g is None or bias is not None or transposed or groups != 1:
            continue
        # The strides of the model's convolution are the dilations of this one, and vice versa.
        weight, result = _weight(x, (dilations, padding, strides)), _result(node)
        if weight is None or result is None or not _fixed(result, weight) or _value(result).shape != _value(weight).shape:
            continue
        with graph.inserting_before(node):
            options = (None, dilations, padding, strides, False, [0] * len(strides), 1, [False, True, False])
            pair = graph.call_function(aten.convolution_backward.default, (g, x, weight, *options))
            item = graph.call_function(operator.getitem, (pair, 1))
        pair.meta.update(result.meta, val=(None, _value(result), None))
        item.meta.update(result.meta)
        result.replace_all_uses_with(item)
        count += 1
    graph.eliminate_dead_code()
    return count


def _untransposed(node: Any) -> fx.Node | None:
    """Return the input of a permute that swaps the first two axes; None for any other node."""
    if not isinstance(node, fx.Node) or node.target is not aten.permute.default:
        return None
    order = list(node.args[1])  # type: ignore[arg-type]
    return node.args[0] if order == [1, 0, *range(2, len(order))] else None  # type: ignore[return-value]


def _weight(x: fx.Node, form: tuple[Any, ...]) -> fx.Node | None:
    """Return the weight of the first convolution of ``x`` that has one group and the strides, padding and dilations of ``form``.

    Return None if there is no such convolution, or if that convolution is transposed.
    """
    for user in x.users:
        if user.target is aten.convolution.default and user.args[0] is x and user.args[3:6] == form and user.args[8] == 1:
            return user.args[1] if not user.args[6] else None  # type: ignore[return-value]
    return None


def _result(node: fx.Node) -> fx.Node | None:
    """Return the last of the nodes that transpose the result of the convolution ``node`` back and then slice it to the weight's size.

    Return None if no transposition follows the convolution. There may be no slices.
    """
    last = next(iter(node.users)) if len(node.users) == 1 else None
    if last is None or _untransposed(last) is not node:
        return None
    while len(last.users) == 1 and (user := next(iter(last.users))).target is aten.slice.Tensor:
        last = user
    return last


def recompute_masks(graph: fx.Graph) -> int:
    """Mark each comparison of a floating-point CPU value with a number, so that backward recomputes it. Return how many were marked."""
    comparisons = list[Any]()
    for node in graph.nodes:
        value = _value(node.args[0]) if node.op == "call_function" and node.target in _COMPARISONS else None
        if isinstance(value, torch.Tensor) and value.device.type == "cpu" and value.is_floating_point():
            comparisons.append(node)

    for node in comparisons:
        node.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
        # otherwise backward could recompute the ReLU, too, and store the mask
        if node.args[0].target is aten.relu.default:
            node.args[0].meta["recompute"] = CheckpointPolicy.MUST_SAVE
    return len(comparisons)
