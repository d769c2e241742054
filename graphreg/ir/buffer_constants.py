"""Values that a forward computes from buffers alone, which are no sites: torchvision has no nodes for them."""

from __future__ import annotations

from collections.abc import Collection

from torch import fx


class BufferConstants:
    """Those of a graph, found node by node in its order. ``buffers``: the names of the model's buffers."""

    def __init__(self, buffers: Collection[str] = ()) -> None:
        self.buffers = buffers
        self._nodes: set[fx.Node] = set()

    def __contains__(self, node: object) -> bool:
        return node in self._nodes

    def add(self, node: fx.Node) -> None:
        """Count a node among them whatever it reads."""
        self._nodes.add(node)

    def take(self, node: fx.Node) -> bool:
        """Whether a node reads a buffer, or such values alone. It is one of them from then on."""
        if node.op == "get_attr":
            is_constant = node.target in self.buffers
        else:
            inputs = node.all_input_nodes if self._nodes else ()
            is_constant = bool(inputs) and self._nodes.issuperset(inputs)
        if is_constant:
            self._nodes.add(node)
        return is_constant
