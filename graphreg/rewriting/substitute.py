"""Puts the model's own calls back where a runtime module has replaced native dropout.

The runtime module is called with the arguments of the original call, and with ``noise``. So it is enough to restore the op and the target,
and to remove ``noise``.
"""

from __future__ import annotations

from torch import fx

from graphreg.ir import copied, is_native_dropout, unmark


def restore(node: fx.Node) -> None:
    """Make the node call again what it calls in the model."""
    was = unmark(node).was
    assert was is not None
    node.op, node.target = was
    node.kwargs = {name: value for name, value in node.kwargs.items() if name != "noise"}


def restored(graph: fx.Graph) -> fx.Graph:
    """Return a copy of the graph in which native dropouts call the originals again; the graph itself if no native dropout was replaced."""
    if not any(map(is_native_dropout, graph.nodes)):
        return graph
    copy = copied(graph)
    for node in filter(is_native_dropout, copy.nodes):
        restore(node)
    return copy
