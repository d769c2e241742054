"""What ``module.compile()`` does to the graph of forward and backward in one, where a penalty differentiates, before it is cut in two.

Three things that second derivatives bring with them cost more on a CPU than they compute:

- torch writes the sums of batch norm's second derivative one axis at a time (``sum_exclude_dim1``); Inductor then stores each
  partial sum, and cannot fuse the three.
- the mask of a ReLU (``output <= 0``) is wanted in the pull, in its derivative and in the loss's. A partitioner that weighs
  bytes keeps it, a bool tensor, which Inductor stores at 12 ns an element (a float: 0.1). It is computed again from the
  output, which is kept anyway.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

aten = torch.ops.aten
_COMPARISONS = {getattr(aten, name).Scalar for name in ("le", "lt", "ge", "gt", "eq", "ne")}


def simplify(graph: fx.Graph) -> None:
    """All of it."""
    merge_sums(graph)
    recompute_masks(graph)


def merge_sums(graph: fx.Graph) -> int:
    """``sum(sum(x, a), b)`` becomes one sum over both, where nothing else reads the first; how many were taken out."""
    count = 0
    for node in list(graph.find_nodes(op="call_function", target=aten.sum.dim_IntList)):
        inner = node.args[0]
        while isinstance(inner, fx.Node) and inner.target is aten.sum.dim_IntList and _merges(inner, node):
            keeps = _keeps(node)
            rank = _value(inner.args[0]).dim()
            first = {d % rank for d in inner.args[1]}  # type: ignore[union-attr]
            left = list(range(rank)) if keeps else [d for d in range(rank) if d not in first]
            dims = sorted(first | {left[d % len(left)] for d in node.args[1]})  # type: ignore[union-attr]
            node.args = (inner.args[0], dims, keeps)
            graph.erase_node(inner)
            inner, count = node.args[0], count + 1
    return count


def _merges(inner: fx.Node, outer: fx.Node) -> bool:
    plain = not inner.kwargs and not outer.kwargs and len(inner.users) == 1
    return plain and bool(inner.args[1]) and bool(outer.args[1]) and _keeps(inner) == _keeps(outer)


def _keeps(node: fx.Node) -> bool:
    return len(node.args) > 2 and bool(node.args[2])


def _value(node: Any) -> Any:
    return node.meta.get("val") if isinstance(node, fx.Node) else None


def recompute_masks(graph: fx.Graph) -> int:
    """Have the comparisons of values with a number computed again in backward, on a CPU; how many there are."""
    found = [node for node in graph.nodes if node.op == "call_function" and node.target in _COMPARISONS and _is_large_on_cpu(node)]
    for node in found:
        node.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
    return len(found)


def _is_large_on_cpu(node: fx.Node) -> bool:
    value = _value(node.args[0])
    return isinstance(value, torch.Tensor) and value.device.type == "cpu" and value.is_floating_point()
