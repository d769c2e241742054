"""Finds the calls of blocks that each node of a flat graph belongs to. A block is a module that ``blocks=`` selects."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from torch import fx

from graphreg.ir.call_records import recorded_calls
from graphreg.ir.metadata import Kind, ModuleCalls, is_kind, is_marked, surrounding_calls
from graphreg.ir.operations import nodes_in

# kinds of added nodes that are in no block
OUTSIDE_BLOCKS = (Kind.KEY, Kind.CLOCK, Kind.TOTAL, Kind.READ, Kind.ATTACH, Kind.ATTACHED, Kind.KEEP)


def opened_paths(graphs: Iterable[fx.Graph], paths: Collection[str]) -> frozenset[str]:
    """Return those of ``paths`` whose modules the graphs inline. The graphs call the other modules as a whole, or not at all."""
    return frozenset(path for graph in graphs for node in graph.nodes for path, _ in surrounding_calls(node) or () if path in paths)


def inlined(graphs: Iterable[fx.Graph], paths: Collection[str]) -> frozenset[str]:
    """Return the same as ``opened_paths``, and those of ``paths`` whose modules compute nothing, so that no node is theirs."""
    graphs = tuple(graphs)
    return opened_paths(graphs, paths) | {path for graph in graphs for path, _ in recorded_calls(graph) if path in paths}


def homes(graph: fx.Graph, blocks: Collection[str]) -> dict[fx.Node, ModuleCalls]:
    """Return, for each node, the calls of ``blocks`` that the node belongs to, outermost first.

    The ``get_attr`` nodes are not in the dict, because they belong to their readers. Inputs, the output and ``OUTSIDE_BLOCKS`` belong to no
    call. For most other nodes, the trace has recorded the calls. If graphreg added a node, and no calls are recorded, the node belongs to
    the calls that all values in its first argument belong to. Any other node without a record belongs to the calls that its neighbours
    have in common (see ``_neighbours``), because the nodes of a trace are in the order of execution.
    """
    found: dict[fx.Node, ModuleCalls] = {}
    unknown: list[fx.Node] = []
    for node in graph.nodes:
        if node.op in ("placeholder", "output") or is_kind(node, *OUTSIDE_BLOCKS):
            found[node] = ()
        elif node.op == "get_attr":
            continue
        elif (calls := surrounding_calls(node)) is not None:
            found[node] = tuple(call for call in calls if call[0] in blocks)
        else:
            unknown.append(node)
    for node in unknown:
        # graphreg added the node: it belongs where the value is on which it acts.
        if is_marked(node):
            found[node] = _shared(found[value] for value in nodes_in(node.args[:1]) if value in found)
        else:
            found[node] = _shared(found[each] for each in _neighbours(node, found))
    for node in graph.nodes:  # a measurement of values from several calls belongs only to the calls that contain all these values
        if is_kind(node, Kind.MEASURE):
            found[node] = _shared([found[node], *(found[value] for value in nodes_in(node.args[:1]) if value in found)])
    return found


def _neighbours(node: fx.Node, known: Collection[fx.Node]) -> list[fx.Node]:
    """Return the nodes whose common calls are the calls of ``node``; an empty list if the node belongs to no block.

    Args:
        node: A node without a record of calls.
        known: The nodes whose calls are known.

    Returns:
        The readers of the node, if the node reads nothing but attributes (``get_attr``) and the calls of all readers are known. Otherwise
        the nearest known nodes before and after the node.
    """
    if node.users and all(source.op == "get_attr" for source in node.all_input_nodes):
        readers = [reader for reader in node.users if reader in known]
        if len(readers) == len(node.users):
            return readers
    before, after = node.prev, node.next
    while before.op != "root" and before not in known:
        before = before.prev
    while after.op != "root" and after not in known:
        after = after.next
    return [before, after] if before in known and after in known else []


def _shared(calls: Iterable[ModuleCalls]) -> ModuleCalls:
    """Return the longest common beginning of several tuples of calls."""
    every = list(calls)
    if not every:
        return ()
    count = 0
    while all(len(each) > count and each[count] == every[0][count] for each in every):
        count += 1
    return every[0][:count]
