"""Inductor passes that graphreg adds where Inductor compiles a graph that draws noise or has penalties.

While Dynamo traces a draw or a penalty, it calls ``improve_graph`` or ``improve_derivatives``,
which adds a pass to the options with which this one graph will be compiled. So it does not matter
how the user calls torch.compile, and no other graph is affected. The backend ``graphreg.backend``
calls Inductor itself, and adds the pass then. A pass of the user's in one of the two slots that
graphreg uses (``SLOT`` and ``JOINT_GRAPH_SLOT``) stays, and graphreg's is left out.

On a CPU Inductor replaces ``mm(a, b) + x`` by ``addmm(x, a, b)`` (``is_valid_addmm_fusion`` in its
post_grad.py), even if ``x`` is the result of an elementwise operation and nothing else reads ``x``.
Then ``x`` is written to memory, copied into the result, and read again. Backward of a penalty on a
linear layer's weight has this form: the layer's weight gradient is ``mm(a, b)``, and the penalty's
gradient is ``x``. With ``addmm``, the penalty on a 512 x 512 weight adds 0.25 ms to a step; with
``mm`` and a fused addition, 0.1 ms.

On a GPU, Inductor keeps ``mm`` and the addition separate if only elementwise operations read the
sum (``should_prefer_unfused_addmm``), whatever computes ``x``. On a CPU, the pass ``unfuse``
separates them if an elementwise operation computes ``x``, whatever reads the sum. Inductor then
fuses the addition with that operation.

The same pass gives elements of small tensors buffers of their own; ``own_elements.py`` says why.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from graphreg.compiler import joint_graph, own_elements
from graphreg.compiler.joint_graph import simplify
from graphreg.torch_internals.dynamo_marks import assume_constant_result
from graphreg.torch_internals.inductor import add_inductor_options, graph_pass
from graphreg.torch_internals.operators import OpOverload

SLOT, JOINT_GRAPH_SLOT = "post_grad_custom_post_pass", "joint_custom_post_pass"


def with_our_passes(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options of Inductor with graphreg's pass, unless the user's passes already use one of the two slots."""
    if {SLOT, JOINT_GRAPH_SLOT}.intersection(options):
        return dict(options)
    # The files that define the pass are part of Inductor's cache key: after a change of the pass,
    # Inductor must not take a graph that the old one made.
    return {**options, SLOT: graph_pass(_improve, __file__, own_elements.__file__)}


@assume_constant_result
def improve_graph() -> None:
    """Add graphreg's passes to the graph that Dynamo is capturing. Dynamo calls this function where noise or a penalty is computed."""
    add_inductor_options({SLOT: graph_pass(_improve, __file__, own_elements.__file__)})


@assume_constant_result
def improve_derivatives() -> None:
    """Add graphreg's passes for second derivatives to the graph that Dynamo is capturing, if a penalty in it differentiates the model."""
    add_inductor_options({JOINT_GRAPH_SLOT: graph_pass(simplify, joint_graph.__file__)})


def _improve(graph: fx.Graph) -> None:
    unfuse(graph)
    own_elements.give_buffers(graph)


def unfuse(graph: fx.Graph) -> int:
    """Split each ``addmm`` into ``mm`` and ``add``, in place, if an elementwise operation on a CPU computes its addend.

    Return how many were split.
    """
    aten, count = torch.ops.aten, 0
    for node in graph.find_nodes(op="call_function", target=aten.addmm.default):
        x, a, b = node.args[:3]
        # addmm may scale the product or the addend (``alpha=``, ``beta=``); mm and add would not.
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
    """Return whether an elementwise operation on a CPU computes ``x``, only ``node`` reads ``x``, and ``x`` has the sum's shape."""
    if not isinstance(x, fx.Node) or len(x.users) != 1 or not isinstance(x.target, OpOverload):
        return False
    value, result = x.meta.get("val"), node.meta.get("val")
    if not isinstance(value, torch.Tensor) or not isinstance(result, torch.Tensor) or value.device.type != "cpu":
        return False
    return torch.Tag.pointwise in x.target.tags and value.shape == result.shape
