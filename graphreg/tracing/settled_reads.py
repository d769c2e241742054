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

from graphreg.ir.metadata import labels_to_move, move_module_labels, own_labels, place_beside, scope_of
from graphreg.ir.naming import Namer, label_node
from graphreg.ir.operations import IN_PLACE_OPERATORS, Operations, first_argument, function_name, is_in_place, is_port, is_size, takes_apart
from graphreg.ir.roles import BOUNDARY
from graphreg.ir.views_and_writes import ViewsAndWrites
from graphreg.tracing.shape_decisions import DECISIONS

_T = TypeVar("_T")
_VIEWS = {
    "view", "view_as", "t", "transpose", "swapaxes", "swapdims", "permute", "movedim", "moveaxis", "squeeze", "unsqueeze", "select",
    "narrow", "expand", "expand_as", "unbind", "chunk", "split", "diagonal", "unfold", "unflatten", "detach", "slice", "alias",
    "getitem", "__getitem__", "getattr", "as_strided", "numpy_T", "matrix_H", "mT", "mH",
}  # fmt: skip


def written(value: _T) -> _T:
    """Return the value as it is: a name for what it contains after a write."""
    return value


def settle_reads(graph: fx.Graph, model: nn.Module, labels: bool = True) -> None:
    """Let later nodes read a value as a write has left it, and take items out of tuples early. The graph is changed in place.

    ``labels``: whether the nodes have their labels already.
    """
    work = _Work(graph, Operations(model), labels)
    for node in list(graph.nodes):
        work.take_out_early(node)
    work.number()
    for node in list(graph.nodes):
        work.follow(node)


class _Work:
    """The writes of one graph, and the order of its nodes."""

    def __init__(self, graph: fx.Graph, operations: Operations, labels: bool) -> None:
        self.graph, self.operations, self.effects = graph, operations, ViewsAndWrites(operations)
        self.order: dict[fx.Node, float] = {}
        self.number()
        self.labels, self.namer = labels, Namer(operations.modules)
        for label in (label for node in graph.nodes for label in own_labels(node)) if labels else ():
            self.namer.claim(label.text)

    def number(self) -> None:
        """Note the order of the nodes."""
        self.order = {node: i for i, node in enumerate(self.graph.nodes)}

    def take_out_early(self, item: fx.Node) -> None:
        """Take an item out of its tuple before anything reads the whole tuple, unless that may write into it."""
        if is_port(item, self.operations):
            whole = item.args[0]
            before = [user for user in whole.users if self.order[user] < self.order[item]]  # type: ignore[union-attr]
            earlier = [user for user in before if not takes_apart(user) and user.target is not len and user.target not in DECISIONS]
            if earlier and not any(whole in self.effects.writes(user) for user in earlier):
                whole.append(item)  # type: ignore[union-attr]
                # what asserts how many items there are stays before them
                for user in (user for user in before if user.target is len or user.target in DECISIONS):
                    asserted = [each for each in user.users if each.target in DECISIONS and each.all_input_nodes == [user]]
                    for node in (*asserted, user) if user.all_input_nodes == [whole] else ():
                        whole.append(node)  # type: ignore[union-attr]

    def follow(self, write: fx.Node) -> None:
        """Follow the writes of one node."""
        for value in self.effects.writes(write, is_definite=True):
            views = self._views(value, write)
            if returns_itself(write, self.effects) and first_argument(write) == [value]:
                if self._readers(value, write):
                    self._repoint(value, write, write)
            else:
                views = [value, *views]
            for each in views:
                # what is between two writes reads nothing, so one node after the second is enough
                readers = self._readers(each, write)
                if readers and (each not in self.effects.writes(readers[0], is_definite=True) or labels_to_move(each, write)):
                    self._repoint(each, write, self._insert(each, write))

    def _later(self, value: fx.Node, write: fx.Node) -> list[fx.Node]:
        """Return the nodes that read a value after a write, in order."""
        return sorted((user for user in value.users if self.order[user] > self.order[write]), key=self.order.__getitem__)

    def _readers(self, value: fx.Node, write: fx.Node) -> list[fx.Node]:
        """Return the nodes that read the content of a value after a write; none if the value can be no site."""
        is_input = value.op == "placeholder" and BOUNDARY not in value.meta
        if is_input or value.op == "get_attr" or self.operations.is_list(value):
            return []
        later = self._later(value, write)
        return [] if all(is_size(user, lambda node: False) for user in later) else later

    def _views(self, value: fx.Node, write: fx.Node) -> list[fx.Node]:
        """Return the values that a value is a view of, as writes have left them, and the views of it from before a write."""
        views, waiting = dict[fx.Node, None](), [value]
        for node in waiting:
            found = self._sources(node)
            found += [user for user in node.users if self._is_before(user, write) and self._is_same(user, node)]
            waiting += [each for each in found if each not in views and each is not value]
            views |= dict.fromkeys(found)
        waiting = [value]
        for node in waiting:
            found = [user for user in node.users if self._is_before(user, write) and node in self._sources(user) and user not in views]
            waiting += found
            views |= dict.fromkeys(found)
        return [each for each in views if each is not value]

    def _is_before(self, node: fx.Node, write: fx.Node) -> bool:
        return self.order[node] < self.order[write]

    def _is_same(self, node: fx.Node, value: fx.Node) -> bool:
        """Return whether a node is the tensor of another one, after a write."""
        return node.target is written or (first_argument(node) == [value] and returns_itself(node, self.effects))

    def _sources(self, node: fx.Node) -> list[fx.Node]:
        """Return the values that a value is a view of, or the same tensor as. ``reshape`` and the like, which may copy, do not count."""
        is_view = node.target is written or function_name(node) in _VIEWS or returns_itself(node, self.effects)
        return [each for each in self.effects.shares(node) if not self.operations.is_list(each)] if is_view else []

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


def returns_itself(node: fx.Node, effects: ViewsAndWrites) -> bool:
    """Return whether a node writes into its first argument and returns it: ``h.add_(1)``, ``h += 1``, ``F.relu(h, inplace=True)``."""
    first = first_argument(node)
    if not first or node.target is operator.setitem or first[0] not in effects.writes(node, is_definite=True):
        return False
    module = effects.operations.module(node)
    return not module._modules if module is not None else node.target in IN_PLACE_OPERATORS or is_in_place(node)
