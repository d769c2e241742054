"""Finds which calls of a module depend on earlier calls of the same module, and which sites hold the same value up to scale."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import fx

from graphreg.ir.convolution_axes import ATEN_NAMES
from graphreg.ir.dataflow import sizes_of
from graphreg.ir.metadata import own_labels
from graphreg.ir.operations import Operations, function_name, nodes_in
from graphreg.ir.roles import labels_of, site_nodes
from graphreg.ir.views_and_writes import ViewsAndWrites

# the name of each call of a module -> the name of the first call in its chain
Chains = Mapping[str, str]


def chains(graphs: Iterable[fx.Graph], operations: Operations, path: str) -> Chains:
    """Group the calls of the module at ``path`` into chains, in which each call reads, directly or not, the output of an earlier one."""
    first_calls: dict[str, str] = {}
    for graph in graphs:
        for call, first in _chains(graph, operations, path).items():
            first_calls.setdefault(call, first)
    return first_calls


def _chains(graph: fx.Graph, operations: Operations, path: str) -> dict[str, str]:
    effects = ViewsAndWrites(operations)
    first: dict[str, str] = {}
    order: dict[str, int] = {}
    # the last two calls that a node depends on; one of them may be the call that made it
    latest: dict[fx.Node, tuple[str, ...]] = {}

    for node in graph.nodes:
        reads = sorted({call for n in node.all_input_nodes for call in latest.get(n, ())}, key=order.__getitem__)[-2:]
        # labels_of gives none for a tuple whose first element is read
        labels = (*labels_of(node, operations), *own_labels(node))
        made_by = next((label.name for label in labels if label.module == path), None)
        if made_by is not None:
            order.setdefault(made_by, len(order))
            before = [call for call in reads if call != made_by]
            # unless an earlier value of this call has set the entry
            if before and first.get(made_by, made_by) == made_by:
                first[made_by] = first[before[-1]]
            first.setdefault(made_by, made_by)
        if reads or made_by is not None:
            latest[node] = tuple(reads) if made_by is None else (*before[-1:], made_by)
            # states may be written into a tensor, step by step
            latest.update(dict.fromkeys(effects.writes(node), latest[node]))
    return first


def one_value_over_again(graph: fx.Graph, operations: Operations, among: Iterable[str]) -> list[tuple[str, ...]]:
    """Group those sites of ``among`` that hold the same value up to scale. A group has two sites or more, in the order of the forward.

    Only operations that multiply or rearrange elements may lie between two sites of a group: views,
    native dropout, identities, and multiplication by something that does not depend on an input. A
    norm counts as such an operation although it also shifts, because the shift does not bring back
    elements that a splice has zeroed.
    """
    nodes = site_nodes(graph, operations)
    names = {nodes[name]: name for name in among if name in nodes}
    data = _data(graph)
    before = {node: earlier for node in names if (earlier := _before(node, names, operations, data)) is not None}
    groups, inner = [], set(before.values())
    for node in names:
        if node in inner or node not in before:  # it is not the last of its group, or it is alone
            continue
        group = [node]
        while group[-1] in before:
            group.append(before[group[-1]])
        groups.append(tuple(names[each] for each in reversed(group)))
    return groups


def _before(node: fx.Node, among: Mapping[fx.Node, str], operations: Operations, data: set[fx.Node]) -> fx.Node | None:
    """Return the nearest earlier node in ``among`` that has the same value up to scale; None if there is none."""
    current: fx.Node | None = node
    while current is not None:
        current = _same_but_for_scale(current, operations, data)
        if current in among:
            return current
    return None


def _same_but_for_scale(node: fx.Node, operations: Operations, data: set[fx.Node]) -> fx.Node | None:
    """Return the operand that the node's value equals up to scale; None if there is none."""
    name = function_name(node).strip("_")
    if operations.passes_through(node) or operations.is_norm(node):
        return next(nodes_in(node.args), None)
    if operations.is_opaque(node):
        return None
    operands = [operand for operand in nodes_in(node.args) if operand in data]
    divides = ATEN_NAMES.get(name, name) in ("div", "divide") and node.args[:1] == tuple(operands)
    scales = divides or ATEN_NAMES.get(name, name) in ("mul", "multiply", "neg")
    return operands[0] if scales and len(operands) == 1 else None


def _data(graph: fx.Graph) -> set[fx.Node]:
    """Return the nodes that depend on an input through tensors, not only through sizes."""
    data, sizes = set[fx.Node](), sizes_of(graph)
    for node in graph.nodes:
        if node not in sizes and (node.op == "placeholder" or not data.isdisjoint(node.all_input_nodes)):
            data.add(node)
    return data
