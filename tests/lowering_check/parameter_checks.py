"""Checks that each read of a parameter in a rewritten graph gets the result of exactly those splices that the plan has for it."""

from __future__ import annotations

from collections.abc import Container

from torch import fx

from graphreg.ir.layer_calls import LAYER, PARAMETERS, call_with, instead_of
from graphreg.ir.metadata import Kind, addition_of, is_kind
from graphreg.ir.parameter_reads import ParameterRead, ParameterReads
from graphreg.planning.plan import Edit, Plan
from graphreg.rewriting.invariants import fail


def check_parameters(graph: fx.Graph, original: fx.Graph, reads: ParameterReads, plan: Plan) -> None:
    """Raise GraphRegError unless the splices on parameters act at the reads that the plan selects, in the plan's order.

    Args:
        graph: The emitted graph.
        original: The traced graph.
        reads: The reads of parameters in the traced graph.
        plan: The plan.
    """
    edits: dict[str, list[Edit]] = {}
    for edit in plan.edits:
        if edit.replaces_parameter:
            edits.setdefault(edit.site.name, []).append(edit)
    nodes = {node.name: node for node in graph.nodes}
    used = set[fx.Node]()
    for name, at_parameter in edits.items():
        for read in reads.get(name, ()):
            wanted = [edit for edit in at_parameter if read.is_by(edit.readers)]
            twin = nodes[read.node.name]
            value = _in_call(twin, read, bool(wanted)) if read.source is None else _fetched(twin, read, name, nodes[read.source.name], used)
            used.update(_follow(value, wanted, read, name))
    used.update(value for node in graph.nodes if is_kind(node, Kind.CALL) for value in _layer(node))
    strange = [node for node in graph.nodes if _is_ours(node, edits) and node not in used]
    if strange:
        fail(f"{strange[0].name} is not in the plan.")
    for node in original.nodes:
        if node.op == "call_module" and is_kind(nodes[node.name], Kind.CALL):
            _require_all(nodes[node.name], [read for name in edits for read in reads.get(name, ()) if read.node is node])


def _is_ours(node: fx.Node, parameters: Container[str | None]) -> bool:
    addition = addition_of(node)
    if addition is None:
        return False
    if addition.kind in (Kind.PARAMETER, Kind.REPLACED, Kind.LAYER):
        return True
    return addition.kind == Kind.SPLICE and addition.site in parameters and "." in str(node.target) and _on_parameter(node)


def _on_parameter(node: fx.Node) -> bool:
    """Whether a splice acts on a parameter: on a value that a ``get_attr`` node fetches, maybe after other splices."""
    value = node.args[0]
    while isinstance(value, fx.Node) and is_kind(value, Kind.SPLICE):
        value = value.args[0]
    return isinstance(value, fx.Node) and value.op == "get_attr"


def _in_call(twin: fx.Node, read: ParameterRead, replaced: bool) -> fx.Node | None:
    """Return the node that replaces a parameter in the call of a layer; None if the call gets the parameter itself."""
    if not is_kind(twin, Kind.CALL):
        if replaced:
            fail(f"{twin.name} reads the parameter {read.name} itself, not its replacement.")
        return None
    value = twin.kwargs[PARAMETERS].get(read.name)  # type: ignore[union-attr]
    return value if isinstance(value, fx.Node) else None


def _fetched(twin: fx.Node, read: ParameterRead, site: str, source: fx.Node, used: set[fx.Node]) -> fx.Node | None:
    """Return what a node of the model reads instead of the parameter that ``source`` fetches; None if it reads the parameter itself."""
    found = list[fx.Node]()
    for each in twin.all_input_nodes:
        addition = addition_of(each)
        if addition is None or addition.site != site:
            continue
        if addition.kind == Kind.SPLICE:
            found.append(each)
        elif addition.kind == Kind.REPLACED and each.target is instead_of and each.args[0] is source:
            used.add(each)
            found.append(each.args[1])  # type: ignore[arg-type]
    if len(found) > 1:
        fail(f"{twin.name} reads the parameter {site} in {len(found)} forms.")
    if found and source in twin.all_input_nodes:
        fail(f"{twin.name} reads both the parameter {site} and its replacement.")
    return found[0] if found else None


def _follow(value: fx.Node | None, wanted: list[Edit], read: ParameterRead, site: str) -> list[fx.Node]:
    """Check that ``value`` results from the splices in ``wanted``, in this order, on the parameter. Return the nodes that compute it."""
    nodes = list[fx.Node]()
    for edit in reversed(wanted):
        addition = addition_of(value) if value is not None else None
        if value is None or addition is None or (addition.kind, addition.regularizer, addition.site) != (Kind.SPLICE, edit.name, site):
            fail(f"{edit.name} does not act on the parameter {site} where {read.node.name} reads it.")
        nodes.append(value)
        value = value.args[0] if isinstance(value.args[0], fx.Node) else None
    if not wanted:
        if value is not None:
            fail(f"{value.name} acts on the parameter {site} where {read.node.name} reads it, and the plan does not say so.")
        return nodes
    own = value is not None and is_kind(value, Kind.PARAMETER)
    names = {site} if own or read.source is None else {str(read.source.target), site}
    if value is None or value.op != "get_attr" or not (str(value.target) in names or (not own and addition_of(value) is None)):
        fail(f"{wanted[0].name} does not read the parameter {site}.")
    return [*nodes, value]


def _layer(call: fx.Node) -> list[fx.Node]:
    """Check that a call calls the layer that the model calls there; return the node that fetches the layer."""
    addition, layer = addition_of(call), call.kwargs.get(LAYER)
    was = addition.was if addition is not None else None
    fetches = isinstance(layer, fx.Node) and is_kind(layer, Kind.LAYER) and layer.op == "get_attr"
    if not isinstance(layer, fx.Node) or not fetches or call.target is not call_with or was != ("call_module", layer.target):
        fail(f"{call.name} does not call the layer that it calls in the model.")
    return [layer]


def _require_all(call: fx.Node, reads: list[ParameterRead]) -> None:
    """Check that a call of a layer replaces only parameters that the plan replaces there."""
    known = {read.name for read in reads}
    more = [name for name in call.kwargs[PARAMETERS] if name not in known]  # type: ignore[union-attr]
    if more:
        fail(f"{call.name} replaces the parameter {more[0]}, which is not in the plan.")
