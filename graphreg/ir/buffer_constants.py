"""Finds the values that a forward computes from buffers alone. Such a value is no site and gets no name.

torch.fx, and therefore torchvision's feature extraction, computes these values while it traces, and
has no nodes for them. If they took names, the numbers in the names of later values would differ
from torchvision's.
"""

from __future__ import annotations

from collections.abc import Collection

from torch import fx


class BufferConstants:
    """The nodes whose values are computed from buffers alone. Call ``take`` with each node, in graph order.

    ``buffers``: the names of the model's buffers.
    """

    def __init__(self, buffers: Collection[str] = ()) -> None:
        self.buffers = buffers
        self._nodes: set[fx.Node] = set()

    def __contains__(self, node: object) -> bool:
        return node in self._nodes

    def add(self, node: fx.Node) -> None:
        """Add a node without checking what it reads."""
        self._nodes.add(node)

    def take(self, node: fx.Node) -> bool:
        """Add a node if it fetches a buffer, or if all nodes that it reads were added before. Return whether it was added."""
        if node.op == "get_attr":
            is_constant = node.target in self.buffers
        else:
            inputs = node.all_input_nodes if self._nodes else ()
            is_constant = bool(inputs) and self._nodes.issuperset(inputs)
        if is_constant:
            self._nodes.add(node)
        return is_constant
