"""Native dropout whose call a runtime module has taken over: how such nodes are told, and how the model's own calls come back.

The runtime module is called with the node's own arguments and ``noise``, so that the way back needs no more than what was called.
"""

from __future__ import annotations

from torch import fx

from graphreg.ir import copied


def is_own(node: fx.Node) -> bool:
    """Whether a leaf stands in the place of the model's own call."""
    return bool(node.meta.get("graphreg", {}).get("kind") == "own")


def restore(node: fx.Node) -> None:
    """Let the node call what it called."""
    node.op, node.target = node.meta.pop("graphreg")["was"]
    node.kwargs = {name: value for name, value in node.kwargs.items() if name != "noise"}


def restored(graph: fx.Graph) -> fx.Graph:
    """The graph with the model's own calls: itself where nothing stands in for one."""
    if not any(map(is_own, graph.nodes)):
        return graph
    copy = copied(graph)
    for node in filter(is_own, copy.nodes):
        restore(node)
    return copy
