"""Storage: which values share it, and whether a value is written into after it was produced."""

from __future__ import annotations

from torch import fx

from graphreg.operators import Operations, first_argument


class Aliases:
    """Answers for one graph; a walk touches only the operations that share the value's storage."""

    def __init__(self, graph: fx.Graph, operations: Operations) -> None:
        self.operations = operations
        self.order = {node: i for i, node in enumerate(graph.nodes)}

    def written_later(self, node: fx.Node, surely: bool = False) -> bool:
        """Whether an operation after ``node`` may write into its value (or ``surely`` does), by any name it has."""
        start = self.order[node]
        return any(
            self.order.get(user, -1) > start and name in self.operations.writes(user, surely)
            for name in self.family(node)
            for user in name.users
        )

    def written_aside(self, node: fx.Node) -> fx.Node | None:
        """A later write that a replacement of ``node`` would not share: through another name of its storage, or read by one."""
        start, family, own = self.order[node], self.family(node), self._downstream(node)
        asides = family - own
        for name in family:
            for user in name.users:
                at = self.order.get(user, -1)
                if at <= start or name not in self.operations.writes(user, surely=True):
                    continue
                read = any(self.order.get(reader, -1) > at for other in (own if name in asides else asides) for reader in other.users)
                if read:
                    return user
        return None

    def _downstream(self, node: fx.Node) -> set[fx.Node]:
        """``node`` and the names made from it."""
        found, waiting = {node}, [node]
        while waiting:
            current = waiting.pop()
            for user in current.users:
                if user not in found and user in self.order and current in self._sources(user):
                    found.add(user)
                    waiting.append(user)
        return found

    def family(self, node: fx.Node) -> set[fx.Node]:
        """The nodes that may share storage with ``node``, itself among them."""
        found, waiting = {node}, [node]
        while waiting:
            current = waiting.pop()
            readers = (user for user in current.users if current in self._sources(user))
            for other in (*self._sources(current), *readers):
                if other not in found and other in self.order:
                    found.add(other)
                    waiting.append(other)
        return found

    def _sources(self, node: fx.Node) -> list[fx.Node]:
        """The arguments whose storage the output may share."""
        if not self.operations.may_alias(node):
            return []
        return self.operations.writes(node) or (list(node.all_input_nodes) if self.operations.is_opaque(node) else first_argument(node))
