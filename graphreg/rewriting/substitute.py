"""Makes the node of a native dropout call a runtime module instead, and makes it call the original again.

The runtime module takes the node's own arguments and ``noise``, so that undoing it takes nothing but the original op and target.
"""

from __future__ import annotations

from torch import fx

from graphreg.ir import copied


def substitute(node: fx.Node, target: str, site: str, key: fx.Node | None) -> None:
    """Make the node call the runtime module ``target``.

    ``site``: the name of the dropout's site; ``key``: the node with the keys of the call, or None if the runtime module draws nothing.
    """
    node.meta["graphreg"] = {"kind": "own", "site": site, "was": (node.op, node.target)}
    node.op, node.target = "call_module", target
    if key is not None:
        node.kwargs = {**node.kwargs, "noise": key}


def is_own(node: fx.Node) -> bool:
    """Whether the node is a native dropout that calls a runtime module instead."""
    return bool(node.meta.get("graphreg", {}).get("kind") == "own")


def restore(node: fx.Node) -> None:
    """Make the node call again what it called in the model."""
    node.op, node.target = node.meta.pop("graphreg")["was"]
    node.kwargs = {name: value for name, value in node.kwargs.items() if name != "noise"}


def restored(graph: fx.Graph) -> fx.Graph:
    """Return a copy of the graph in which native dropouts call the originals; the graph itself if none was replaced."""
    if not any(map(is_own, graph.nodes)):
        return graph
    copy = copied(graph)
    for node in filter(is_own, copy.nodes):
        restore(node)
    return copy
