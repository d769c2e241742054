"""Storage: which values share it, and whether a value is written into after it was produced."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from typing import NamedTuple

from torch import fx

from graphreg.operators import Operations, first_argument


class Write(NamedTuple):
    """An operation of the model that may write into ``name``, and its place in the graph."""

    order: int
    user: fx.Node
    name: fx.Node


class Aliases:
    """Answers for one graph, as it is when this is made. The families of storage are found once, for all questions."""

    def __init__(self, graph: fx.Graph, operations: Operations) -> None:
        self.order = {node: i for i, node in enumerate(graph.nodes)}
        self._sources: dict[fx.Node, list[fx.Node]] = {}  # the arguments whose storage the output may share
        self._family: dict[fx.Node, list[fx.Node]] = {}  # the nodes that may share storage; one list for all of them
        self._writes: dict[int, list[Write]] = {}  # by family, in order
        self._sure: dict[int, list[Write]] = {}  # those that do write, for all that can be seen
        writers = [(node, written) for node in self.order if (written := self._add(node, operations))]
        for node, written in writers:
            surely = operations.writes(node, surely=True)
            for name in written if "graphreg" not in node.meta else ():
                write, family = Write(self.order[node], node, name), id(self._family[name])
                self._writes.setdefault(family, []).append(write)
                if name in surely:
                    self._sure.setdefault(family, []).append(write)

    def _add(self, node: fx.Node, operations: Operations) -> list[fx.Node]:
        """Put a node into its family; what it may write into."""
        written = operations.writes(node)
        self._family[node] = [node]
        if operations.may_alias(node):
            self._sources[node] = written or (list(node.all_input_nodes) if operations.is_opaque(node) else first_argument(node))
            for source in self._sources[node]:
                self._join(self._family[node], self._family[source])
        return written

    def _join(self, one: list[fx.Node], other: list[fx.Node]) -> None:
        """Make two families one; the smaller moves, so that a node moves log(n) times at most."""
        if one is not other:
            large, small = (one, other) if len(one) > len(other) else (other, one)
            large += small
            self._family.update(dict.fromkeys(small, large))

    def written_later(self, node: fx.Node, surely: bool = False) -> bool:
        """Whether an operation after ``node`` may write into its value (or ``surely`` does), by any name it has."""
        writes = (self._sure if surely else self._writes).get(id(self._family[node]))
        return writes is not None and writes[-1].order > self.order[node]

    def written_between(self, node: fx.Node, reader: fx.Node) -> bool:
        """Whether an operation after ``node`` and before ``reader`` may write into its value."""
        writes = self._writes.get(id(self._family[node]), [])
        after = bisect_right(writes, self.order[node], key=lambda write: write.order)
        return after < len(writes) and writes[after].order < self.order[reader]

    def written_aside(self, node: fx.Node) -> fx.Node | None:
        """A later write that a replacement of ``node`` would not share: through another name of its storage, or read by one."""
        if not self.written_later(node, surely=True):
            return None
        family, own = self._family[node], self._downstream(node)
        asides = [name for name in family if name not in own]
        read = {True: self._last_read(asides), False: self._last_read(own)}  # by whether the write goes by a name of its own
        for write in self._sure[id(family)]:
            if write.order > self.order[node] and read[write.name in own] > write.order:
                return write.user
        return None

    def _last_read(self, names: Iterable[fx.Node]) -> int:
        return max((self.order.get(reader, -1) for name in names for reader in name.users), default=-1)

    def _downstream(self, node: fx.Node) -> set[fx.Node]:
        """``node`` and the names made from it."""
        found, waiting = {node}, [node]
        while waiting:
            current = waiting.pop()
            for user in current.users:
                if user not in found and current in self._sources.get(user, ()):
                    found.add(user)
                    waiting.append(user)
        return found
