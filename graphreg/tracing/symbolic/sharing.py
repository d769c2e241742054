"""Compares a trace in which arguments that are one tensor have one proxy with a trace in which each has a proxy of its own."""

from __future__ import annotations

from torch import fx

from graphreg.ir.comparison import described_node
from graphreg.ir.metadata import is_labelled
from graphreg.ir.train_eval import ModeGraphs
from graphreg.tracing.shape_decisions import DECISIONS
from graphreg.tracing.symbolic.holders import LEAF


def same_apart_from_sharing(apart: ModeGraphs, shared: ModeGraphs) -> bool:
    """Return whether two traces compute the same, given that the arguments are one tensor."""
    return apart.keys() == shared.keys() and all(_described(graph) == _described(shared[mode]) for mode, graph in apart.items())


def _described(graph: fx.Graph) -> list[str]:
    """Return a text for each node, with the number of the node for its name, and that of the tensor for a node that stands for an input.

    Assertions are left out, as are the nodes that only assertions read: each of two proxies of one
    tensor has assertions of its own.
    """
    left_out: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        unread = not is_labelled(node) and node.users and all(user in left_out for user in node.users)
        if node.target in DECISIONS or unread:
            left_out.add(node)
    kept = [node for node in graph.nodes if node not in left_out and LEAF not in node.meta]
    names = {node: f"input {node.meta.get(LEAF)}" for node in graph.nodes} | {node: str(i) for i, node in enumerate(kept)}
    return [described_node(node, names) for node in kept]
