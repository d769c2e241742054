"""Substitution: a dropout of the model's own becomes a call of its leaf, in the same node; and back.

The leaf is called with the node's own arguments and ``noise``, so that the way back needs no more than what was called.
"""

from __future__ import annotations

from torch import fx

from graphreg.ir import Addition, Kind, copied, is_own, mark, unmark


def substitute(node: fx.Node, target: str, site: str, key: fx.Node | None) -> None:
    """Let the node call the leaf ``target``; ``key`` None where the leaf draws nothing."""
    mark(node, Addition(Kind.OWN, site=site, was=(node.op, node.target)))
    node.op, node.target = "call_module", target
    if key is not None:
        node.kwargs = {**node.kwargs, "noise": key}


def restore(node: fx.Node) -> None:
    """Let the node call what it called."""
    was = unmark(node).was
    assert was is not None
    node.op, node.target = was
    node.kwargs = {name: value for name, value in node.kwargs.items() if name != "noise"}


def restored(graph: fx.Graph) -> fx.Graph:
    """The graph with the model's own calls: itself where nothing stands in for one."""
    if not any(map(is_own, graph.nodes)):
        return graph
    copy = copied(graph)
    for node in filter(is_own, copy.nodes):
        restore(node)
    return copy
