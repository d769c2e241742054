"""Restores the model's own calls that graphreg has replaced: calls of native dropout, and of layers whose parameters splices replace.

A replaced call has the arguments of the original call, and some keyword arguments of graphreg's. So
it is enough to restore the op and the target, and to remove these keyword arguments.
"""

from __future__ import annotations

from torch import fx

from graphreg.ir.layer_calls import LAYER, PARAMETERS
from graphreg.ir.metadata import Kind, is_kind, is_replaced_call, unmark
from graphreg.ir.serialize import copied_graph

# the keyword arguments that a replaced call has in addition
_OURS = {Kind.NATIVE: ("noise", "clock"), Kind.CALL: (LAYER, PARAMETERS)}


def restore(node: fx.Node) -> None:
    """Make the node call again what it calls in the model."""
    addition = unmark(node)
    assert addition.was is not None
    node.op, node.target = addition.was
    node.kwargs = {name: value for name, value in node.kwargs.items() if name not in _OURS[addition.kind]}


def restored(graph: fx.Graph) -> fx.Graph:
    """Return a copy of the graph in which all nodes of the model do what they do in the model; the graph itself if no call was replaced."""
    if not any(map(is_replaced_call, graph.nodes)):
        return graph
    copy = copied_graph(graph)
    for node in filter(is_replaced_call, copy.nodes):
        restore(node)
    return copy


def with_native_dropout(graph: fx.Graph) -> fx.Graph:
    """Return a copy of the graph in which native dropouts again call what they call in the model. Calls of layers stay replaced."""
    copy = copied_graph(graph)
    for node in copy.nodes:
        if is_kind(node, Kind.NATIVE):
            restore(node)
    return copy
