"""Finds the output of a module call in a graph that has no node for the call, but nodes for the operations inside the module.

The search uses only one fact about each node: during which module calls the node was made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from torch import fx

from graphreg.ir.call_records import CALL_RECORDS, call_key
from graphreg.ir.metadata import calls_of, record_calls

STACK = "nn_module_stack"  # the entry of node.meta in which torch's tracers write the module calls during which a node was made


@dataclass(frozen=True)
class ModuleCall:
    """One call of the module at ``path``. ``key`` is different for every call in the graph. ``kind`` is the name of the module's class."""

    key: str
    path: str
    kind: str


@dataclass(frozen=True)
class ModuleBlock:
    """The nodes that were made during one module call. ``leaving``: those nodes among them whose values are used outside the call."""

    call: ModuleCall
    nodes: tuple[fx.Node, ...]
    leaving: tuple[fx.Node, ...]


def blocks(graph: fx.Graph, calls_of: Callable[[fx.Node], Iterable[ModuleCall]]) -> Iterator[ModuleBlock]:
    """Yield a block for each module call of a graph, in the order in which the calls return.

    ``calls_of`` returns the calls during which a node was made. If a single value leaves a call, it is the module's output. If several
    values leave it, the graph does not show which element of the output each value is.
    """
    members: dict[ModuleCall, dict[fx.Node, None]] = {}
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        for call in calls_of(node):
            members.setdefault(call, {})[node] = None

    def end(call: ModuleCall) -> tuple[int, int, int]:
        first, last = next(iter(members[call])), next(reversed(members[call]))
        return order[last], -order[first], -call.path.count(".")  # in the order in which calls return: inner before outer

    for call in sorted(members, key=end):
        inside = members[call]
        yield ModuleBlock(call, tuple(inside), tuple(node for node in inside if any(user not in inside for user in node.users)))


def record_stacks(graph: fx.Graph) -> None:
    """Record at each node, as plain data, the module calls that torch's tracer stored there.

    The tracer's entry contains classes, which may not be picklable, and its keys differ between torch.fx and torch.export.
    """
    numbers: dict[str, dict[str, tuple[str, int]]] = {}  # the path of a module -> the tracer's key of a call -> path and number of the call
    for node in graph.nodes:
        stack = node.meta.get(STACK)
        if not stack or node.op == "placeholder" or calls_of(node) is not None:
            continue
        calls = []
        for key, (path, *_) in stack.items():
            if path:
                seen = numbers.setdefault(str(path), {})
                call = seen.get(str(key))
                if call is None:
                    call = seen[str(key)] = (str(path), len(seen))
                calls.append(call)
        record_calls(node, tuple(calls))

    # The records of calls get the numbers as keys. A graph that was traced before has them already.
    end = graph.output_node().meta
    records = end.get(CALL_RECORDS)
    if records and not any(isinstance(key, tuple) for key in records):
        numbered = {call_key(path, key): call for path, seen in numbers.items() for key, call in seen.items()}
        for key in (key for key in records if key not in numbered):  # calls during which no node was made
            seen = numbers.setdefault(path := key.rpartition("@")[0], {})
            numbered[key] = seen[key] = (path, len(seen))
        end[CALL_RECORDS] = {call: records[key] for key, call in numbered.items() if key in records}
