"""Settles which node stands for what a later node reads, so that a site is the value that the next layer reads.

``h.masked_fill_(mask, 0)``, ``self.relu(h)`` with ``inplace=True`` or ``out[i] = y`` change a value and are often not assigned to a
variable. Code that comes later reads the node of the value from before the write. Here it gets to read the node of the write, which
returns the same tensor, or, if the write returns something else or nothing, a node of ``written`` after it.

An item that is taken out of a tuple after something has read the whole tuple is taken out before, so that a splice at the item comes first.
"""

from __future__ import annotations

import operator
from typing import TypeVar

from torch import fx, nn

from graphreg.ir.metadata import move_module_labels, own_labels, place_beside, scope_of
from graphreg.ir.naming import Namer, label_node
from graphreg.ir.operations import IN_PLACE_OPERATORS, Operations, first_argument, function_name, is_in_place, is_port, is_size, takes_apart
from graphreg.ir.views_and_writes import ViewsAndWrites

_T = TypeVar("_T")
_VIEWS = {
    "view", "view_as", "t", "transpose", "swapaxes", "swapdims", "permute", "movedim", "moveaxis", "squeeze", "unsqueeze", "select",
    "narrow", "expand", "expand_as", "unbind", "chunk", "split", "diagonal", "unfold", "unflatten", "detach", "slice", "alias",
}  # fmt: skip


def written(value: _T) -> _T:
    """Return the value as it is: a name for what it contains after a write."""
    return value


def settle_reads(graph: fx.Graph, model: nn.Module, labels: bool = True) -> None:
    """Let later nodes read a value as a write has left it, and take items out of tuples early. The graph is changed in place.

    ``labels``: whether the nodes have their labels already.
    """
    operations, order = Operations(model), {node: i for i, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        if is_port(node, operations) and any(order[user] < order[node] and not takes_apart(user) for user in node.args[0].users):
            node.args[0].append(node)
    work = _Work(graph, operations, labels)
    for node in list(graph.nodes):
        work.follow(node)


class _Work:
    """The writes of one graph, and the order of its nodes."""

    def __init__(self, graph: fx.Graph, operations: Operations, labels: bool) -> None:
        self.graph, self.operations, self.effects = graph, operations, ViewsAndWrites(operations)
        self.order: dict[fx.Node, float] = {node: i for i, node in enumerate(graph.nodes)}
        self.labels, self.namer = labels, Namer(operations.modules)
        for label in (label for node in graph.nodes for label in own_labels(node)) if labels else ():
            self.namer.claim(label.text)

    def follow(self, write: fx.Node) -> None:
        """Follow the writes of one node."""
        for value in self.effects.writes(write, is_definite=True):
            if _returns(write, value, self.operations) and self._readers(value, write):
                self._repoint(value, write, write)
            for each in (value, *self._views(value, write)):
                # what is between two writes reads nothing, so one node after the second is enough
                if (readers := self._readers(each, write)) and each not in self.effects.writes(readers[0], is_definite=True):
                    self._repoint(each, write, self._insert(each, write))

    def _later(self, value: fx.Node, write: fx.Node) -> list[fx.Node]:
        """Return the nodes that read a value after a write, in order."""
        return sorted((user for user in value.users if self.order[user] > self.order[write]), key=self.order.__getitem__)

    def _readers(self, value: fx.Node, write: fx.Node) -> list[fx.Node]:
        """Return the nodes that read the content of a value after a write; none if the value can be no site."""
        if value.op in ("placeholder", "get_attr") or self.operations.is_list(value):
            return []
        later = self._later(value, write)
        return [] if all(is_size(user, lambda node: False) for user in later) else later

    def _views(self, value: fx.Node, write: fx.Node) -> list[fx.Node]:
        """Return the values that a value is a view of, and the views of it from before a write. A value that may be a copy is none."""
        views, waiting = dict[fx.Node, None](), [value]
        while waiting and _is_view(node := waiting.pop()) and (sources := first_argument(node)):
            waiting += sources
            views |= dict.fromkeys(sources)
        waiting = [value]
        while waiting:
            found = [user for user in waiting.pop().users if _is_view(user) and self.order[user] < self.order[write]]
            waiting += found
            views |= dict.fromkeys(found)
        return list(views)

    def _insert(self, value: fx.Node, write: fx.Node) -> fx.Node:
        """Insert a node for what a value contains after a write."""
        with self.graph.inserting_after(write):
            node = self.graph.call_function(written, (value,))
        place_beside(node, write, value)
        if self.labels:
            label_node(node, scope_of(write), self.operations.modules, self.namer)
        self.order[node] = self.order[write] + 0.5
        return node

    def _repoint(self, value: fx.Node, write: fx.Node, result: fx.Node) -> None:
        for user in self._later(value, write):
            if user is not result:
                user.replace_input_with(value, result)
        move_module_labels(value, result)


def _returns(write: fx.Node, value: fx.Node, operations: Operations) -> bool:
    """Return whether a write returns the tensor into which it writes: ``h.add_(1)``, ``h += 1``, ``F.relu(h, inplace=True)``."""
    if first_argument(write) != [value] or write.target is operator.setitem:
        return False
    module = operations.module(write)
    if module is not None:
        return not module._modules
    return write.target in IN_PLACE_OPERATORS or is_in_place(write)


def _is_view(node: fx.Node) -> bool:
    """Return whether a node is a view of its first argument for certain. ``reshape`` and the like may copy."""
    name = function_name(node)
    if name in ("getitem", "__getitem__"):
        items = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
        return not any(isinstance(item, (list, fx.Node)) for item in items)
    return name in _VIEWS
