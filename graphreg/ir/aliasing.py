"""Alias analysis of one graph: which values may share storage, and whether an operation writes into a value after it was computed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor, fx

from graphreg.ir.dataflow import reached
from graphreg.ir.layout import clone
from graphreg.ir.operations import Operations, function_name, nodes_in
from graphreg.ir.views_and_writes import ViewsAndWrites, is_inert


class Write(NamedTuple):
    """A possible or definite write: the node ``user``, at position ``order`` in the graph, writes into the value of the node ``name``."""

    order: int
    user: fx.Node
    name: fx.Node


class Aliases:
    """Alias analysis of a graph. It describes the graph at the time of construction, and does not follow later edits.

    Each value has bases: the values from which its storage may come. A base has its storage from no other value: the base of
    ``x.t()[0]`` is ``x``, not ``x.t()``. Two values may alias if they have a common base. Two slices of one tensor have a common base. The
    elements of a tuple that one operation returns have a common base, too, because the analysis does not distinguish them.
    """

    def __init__(self, graph: fx.Graph, operations: Operations) -> None:
        self.order = {node: i for i, node in enumerate(graph.nodes)}
        self.effects = ViewsAndWrites(operations)
        self._bases: dict[fx.Node, frozenset[fx.Node]] = {}
        self._shared_later: dict[fx.Node, list[fx.Node]] = {}  # x -> the values whose storage x gets later: y by ``x.set_(y)``
        for node in self.order:
            if (joined := _joined_storage(node)) is not None:
                self._shared_later.setdefault(joined[0], []).extend(joined[1])
        self._possible, self._definite = self._by_base()

    def _by_base(self) -> tuple[dict[fx.Node, list[Write]], dict[fx.Node, list[Write]]]:
        """Return two dicts with the writes into each base, in graph order: one of all possible writes, one of the definite writes alone."""
        writes: tuple[dict[fx.Node, list[Write]], dict[fx.Node, list[Write]]] = {}, {}
        for node, order in self.order.items():
            if not self.effects.writes(node):  # every definite write is also a possible one
                continue
            for is_definite, by_base in enumerate(writes):
                for name in self.effects.writes(node, bool(is_definite)):
                    for base in self.bases(name):
                        by_base.setdefault(base, []).append(Write(order, node, name))
        return writes

    def bases(self, node: fx.Node) -> frozenset[fx.Node]:
        """Return the bases of the node's value; if it shares no other value's storage, its only base is the value itself."""
        waiting, seen = [node], set[fx.Node]()
        while waiting:
            current = waiting[-1]
            sources = () if current in self._bases else (*self.effects.shares(current), *self._shared_later.get(current, ()))
            missing = [source for source in sources if source not in self._bases and source not in seen]
            if missing and current not in seen:
                seen.add(current)
                waiting += missing
                continue
            waiting.pop()
            if current not in self._bases:
                known = [self._bases[source] for source in sources if source in self._bases] or [frozenset((current,))]
                self._bases[current] = known[0] if len(known) == 1 else frozenset().union(*known)
        return self._bases[node]

    def clone_of(self, node: fx.Node) -> Callable[[Tensor], Tensor]:
        """Return a function that copies the value with its strides.

        This is ``torch.clone`` if the value is known to have no gaps or overlaps in memory, else ``ir.layout.clone``.
        """
        return torch.clone if self.effects.is_dense(node) and node not in self._shared_later else clone

    def is_external(self, node: fx.Node) -> bool:
        """Return whether the value's storage may belong to an input or to the model, so that a write is visible outside the graph."""
        return any(base.op in ("placeholder", "get_attr") for base in self.bases(node))

    def written_later(self, node: fx.Node, is_definite: bool = False) -> bool:
        """Return whether an operation after ``node`` may write into the node's value, through any alias.

        With ``is_definite``, return whether such an operation definitely writes into it.
        """
        return any(writes[-1].order > self.order[node] for writes in self._writes(node, is_definite))

    def sources(self, nodes: Iterable[fx.Node]) -> set[fx.Node]:
        """Return ``nodes`` and all nodes that one of them depends on, also through definite in-place writes."""
        return reached(nodes, lambda node: [*node.all_input_nodes, *(w.user for writes in self._writes(node, True) for w in writes)])

    def _writes(self, node: fx.Node, is_definite: bool = False) -> Iterable[list[Write]]:
        by_base = self._definite if is_definite else self._possible
        return [by_base[base] for base in self.bases(node) if base in by_base] if by_base else []

    def written_aside(self, node: fx.Node) -> fx.Node | None:
        """Return the first node whose definite write would be lost if a new tensor replaced the value of ``node``; None if there is none.

        After the replacement, readers of ``node`` and the aliases made from it use the new tensor. All other aliases use the old storage.
        A write through an alias of one group is lost if an alias of the other group is read later.
        """
        if not self.written_later(node, is_definite=True):
            return None
        derived, bases = self._downstream([node]), self.bases(node)
        asides = self._downstream(bases) - derived
        # whether a write goes through an alias in ``derived`` -> the position of the last read of an alias in the other group
        last_read = {True: self._last_read(asides), False: self._last_read(derived)}
        if any(base.op == "get_attr" for base in bases - derived):  # a tensor of the module is read again at the next call
            last_read[True] = len(self.order)
        for write in sorted({write for writes in self._writes(node, is_definite=True) for write in writes}, key=lambda write: write.order):
            if write.order > self.order[node] and last_read[write.name in derived] > write.order:
                return write.user
        return None

    def read_past(self, node: fx.Node) -> fx.Node | None:
        """Return the first ``as_strided`` that reads ``node`` or an alias made from it; None if there is none.

        Such a node reads the storage by offsets, so a replacement with another memory layout would give it other elements. If the value
        is known to be dense, a replacement has the same layout: then return None, too.
        """
        # asked first, because a probe of operations finds out what is dense
        if not self._strided or self.effects.is_dense(node):
            return None
        return min((self._downstream([node]) - {node}) & self._strided, key=self.order.__getitem__, default=None)

    @cached_property
    def _strided(self) -> set[fx.Node]:
        return {node for node in self.order if function_name(node).startswith("as_strided")}

    def _last_read(self, names: Iterable[fx.Node]) -> int:
        """Return the position of the last node that reads one of ``names``; -1 if no node does."""
        return max((self.order.get(reader, -1) for name in names for reader in name.users), default=-1)

    def _downstream(self, nodes: Iterable[fx.Node]) -> set[fx.Node]:
        """Return ``nodes`` and all aliases made from them."""
        aliases, waiting = set(nodes), list(nodes)
        while waiting:
            current = waiting.pop()
            holders = [holder for holder, others in self._shared_later.items() if current in others]
            for user in (*holders, *current.users):
                if user not in aliases and (user in holders or current in self.effects.shares(user)):
                    aliases.add(user)
                    waiting.append(user)
        return aliases


def _joined_storage(node: fx.Node) -> tuple[fx.Node, list[fx.Node]] | None:
    """If ``x`` shares the storage of other values after the operation (``x.set_(y)``), return ``x`` and the other values; else None."""
    if is_inert(node) or not node.args or not isinstance(node.args[0], fx.Node):
        return None
    name = function_name(node)
    holds = name == "setitem" and isinstance(node.args[1], str)  # ``d["key"] = y`` stores y in a dict; ``t[0] = y`` copies y
    if name == "set_" or holds or (node.op == "call_method" and name in ("append", "extend", "insert", "update", "setdefault")):
        return node.args[0], [other for other in nodes_in((node.args[1:], node.kwargs)) if other is not node.args[0]]
    return None


def of_body(body: fx.GraphModule) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the positions of the arguments that a higher-order operator's result may alias, and of those that the operator may write into.

    ``body``: the module with the graph that the operator runs.
    """
    aliases = Aliases(body.graph, Operations(body))
    inputs = {node: i for i, node in enumerate((n for n in body.graph.nodes if n.op == "placeholder"), 1)}  # argument 0 is the body
    returned = [aliases.bases(node) for node in body.graph.output_node().all_input_nodes]
    written = [aliases.bases(name) for node in body.graph.nodes for name in aliases.effects.writes(node)]
    shares, writes = (tuple(i for node, i in inputs.items() if any(node in bases for bases in group)) for group in (returned, written))
    return shares, writes
