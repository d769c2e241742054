"""Which values of a graph are those of a module, where the graph has no node for it: from the module calls that each node was made in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from torch import fx


@dataclass(frozen=True)
class ModuleCall:
    """One call of a module. ``key``: its own among the calls of the graph; ``kind``: the name of the module's class."""

    key: str
    path: str
    kind: str


@dataclass(frozen=True)
class Block:
    """The nodes that were made in one call, and those of them whose values leave it."""

    call: ModuleCall
    nodes: tuple[fx.Node, ...]
    leaving: tuple[fx.Node, ...]


def blocks(graph: fx.Graph, calls_of: Callable[[fx.Node], Iterable[ModuleCall]]) -> Iterator[Block]:
    """The module calls of a graph in the order in which they return. ``calls_of``: those that a node was made in.

    The value that alone leaves a call is the module's. Where several leave, the graph does not tell which is which.
    """
    members: dict[ModuleCall, dict[fx.Node, None]] = {}
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        for call in calls_of(node):
            members.setdefault(call, {})[node] = None

    def end(call: ModuleCall) -> tuple[int, int, int]:
        first, last = next(iter(members[call])), next(reversed(members[call]))
        return order[last], -order[first], -call.path.count(".")  # as calls return: inner before outer

    for call in sorted(members, key=end):
        inside = members[call]
        yield Block(call, tuple(inside), tuple(node for node in inside if any(user not in inside for user in node.users)))
