"""Inductor passes that ``module.compile()`` (and so ``regularize(compile=True)``) adds to the options the user gave.

On a CPU Inductor makes ``addmm(x, a, b)`` of ``mm(a, b) + x`` (post_grad.py, ``is_valid_addmm_fusion``), also where ``x`` is computed
elementwise and read by nothing else: it is then written to memory, copied into the result, and read once more. The gradient
of every penalty has this form: for a 512 x 512 weight that is 0.25 ms instead of 0.1. On a GPU Inductor itself keeps such a
sum apart (``should_prefer_unfused_addmm``), so that it is fused into what computes ``x``; this pass does so on a CPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from graphreg.compiler import joint_graph
from graphreg.compiler.joint_graph import simplify
from graphreg.torch_internals import OpOverload, graph_pass

SLOT, JOINT_GRAPH_SLOT = "post_grad_custom_post_pass", "joint_custom_post_pass"


def with_our_pass(options: Mapping[str, Any], differentiates: bool = False) -> dict[str, Any]:
    """Add graphreg's passes to the options of torch.compile.

    ``differentiates``: whether a penalty does, so that second derivatives are to be simplified (``joint_graph.py``).
    """
    chosen = dict(options)
    inner = chosen.get("options") or {}
    if chosen.get("backend", "inductor") == "inductor" and chosen.get("mode") is None and not {SLOT, JOINT_GRAPH_SLOT}.intersection(inner):
        passes = {SLOT: graph_pass(unfuse, __file__)}
        if differentiates:
            passes[JOINT_GRAPH_SLOT] = graph_pass(simplify, joint_graph.__file__)
        chosen["options"] = {**inner, **passes}
    return chosen


def unfuse(graph: fx.Graph) -> int:
    """Split ``addmm`` into ``mm`` and ``add`` where the addend is elementwise; returns how many were split."""
    aten, count = torch.ops.aten, 0
    for node in graph.find_nodes(op="call_function", target=aten.addmm.default):
        x, a, b = node.args[:3]
        if any(value != 1 for value in node.kwargs.values()) or not _elementwise_for(node, x):
            continue
        with graph.inserting_before(node):
            product = graph.call_function(aten.mm.default, (a, b))
            total = graph.call_function(aten.add.Tensor, (product, x))
        product.meta.update(node.meta)
        total.meta.update(node.meta)
        node.replace_all_uses_with(total)
        graph.erase_node(node)
        count += 1
    return count


def _elementwise_for(node: fx.Node, x: Any) -> bool:
    if not isinstance(x, fx.Node) or len(x.users) != 1 or not isinstance(x.target, OpOverload):
        return False
    value, result = x.meta.get("val"), node.meta.get("val")
    if not isinstance(value, torch.Tensor) or not isinstance(result, torch.Tensor) or value.device.type != "cpu":
        return False
    return torch.Tag.pointwise in x.target.tags and value.shape == result.shape
