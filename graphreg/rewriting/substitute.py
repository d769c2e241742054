"""Native dropout whose call a runtime module has taken over: how the model's own calls come back.

The runtime module is called with the node's own arguments and ``noise``, so that the way back needs no more than what was called.
"""

from __future__ import annotations

from torch import fx

from graphreg.ir import copied, is_native_dropout, unmark


def restore(node: fx.Node) -> None:
    """Make the node call again what it called in the model."""
    was = unmark(node).was
    assert was is not None
    node.op, node.target = was
    node.kwargs = {name: value for name, value in node.kwargs.items() if name != "noise"}


def restored(graph: fx.Graph) -> fx.Graph:
    """Return a copy of the graph in which native dropouts call the originals; the graph itself if none was replaced."""
    if not any(map(is_native_dropout, graph.nodes)):
        return graph
    copy = copied(graph)
    for node in filter(is_native_dropout, copy.nodes):
        restore(node)
    return copy
