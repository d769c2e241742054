"""Checks that a rewritten module has the additions of its plan and no others: their modules, their arguments, and what reads them."""

from __future__ import annotations

import torch
from torch import fx, nn

from graphreg.ir import layout
from graphreg.ir.cell_states import state_before
from graphreg.ir.layout import apart
from graphreg.ir.metadata import Kind, addition_of, draw_labels, is_kind, is_marked, is_native_dropout
from graphreg.ir.module_record import RULES
from graphreg.ir.operations import Operations
from graphreg.ir.random_ops import is_random
from graphreg.ir.roles import site_nodes
from graphreg.planning.plan import Edit, Plan
from graphreg.regularizer.base import Penalty, Regularizer, Splice
from graphreg.rewriting.instantiate import measures
from graphreg.rewriting.invariants import fail, replaced_by
from graphreg.rewriting.substitute import restored
from graphreg.runtime.clock import CLOCK
from graphreg.runtime.derivative_penalty import Track
from graphreg.runtime.dropout import NativeDropoutRule
from graphreg.runtime.penalty import Measure
from graphreg.runtime.result import Kept, Regularized
from graphreg.runtime.rewritten_module import RewrittenModule
from graphreg.runtime.splice import SpliceRule
from graphreg.session.hosts import graphs_of
from graphreg.tracing.trace import Traced
from lowering_check.parameter_checks import check_parameters
from lowering_check.placement import Placed, placed_in


def check_additions(module: RewrittenModule, traced: Traced, plan: Plan) -> None:
    """Raise GraphRegError unless the module has the plan's additions and nothing else."""
    for mode, emitted in graphs_of(module).items():
        _native_dropouts(emitted, module, plan)
        graph = restored(emitted)  # the checks below look at the model's own calls
        original = traced.graphs[mode]
        placed = placed_in(graph, original, traced, plan)
        placed.check()
        check_parameters(emitted, original, traced.parameter_reads[mode], plan)
        _runtime_modules(graph, module, plan, placed)
        _reaches(graph, plan, placed)


def _native_dropouts(graph: fx.Graph, module: RewrittenModule, plan: Plan) -> None:
    """Check that each native dropout in the plan calls its runtime module, with the key of the call if it draws."""
    planned = {edit.dropout.site.name: edit for edit in plan.native_dropout}
    for node in graph.nodes:
        name = draw_labels(node)[0].text
        if not is_native_dropout(node):
            if name in planned and not is_marked(node) and (node.op == "call_module" or is_random(node)):
                fail(f"{node.name} still calls the native dropout.")
            continue
        rule, edit, key = module.get_submodule(str(node.target)), planned.get(name), node.kwargs.get("noise")
        if edit is None or not isinstance(rule, NativeDropoutRule) or rule.site != name or rule.rate != edit.rate:
            fail(f"{node.name} does not do what was planned.")
        elif edit.draws != (isinstance(key, fx.Node) and is_kind(key, Kind.KEY)):
            fail(f"{node.name} does not take the key of the call.")
        elif edit.is_scheduled != _takes_clock(node):
            fail(f"{node.name} does not take the strengths of the call from the clock.")


def _takes_clock(node: fx.Node) -> bool:
    """Whether a node gets what the clock returns."""
    clock = node.kwargs.get(CLOCK)
    return isinstance(clock, fx.Node) and is_kind(clock, Kind.CLOCK)


def _runtime_modules(graph: fx.Graph, module: RewrittenModule, plan: Plan, placed: Placed) -> None:
    """Check that each addition calls the runtime module that was made for it."""
    planned = {(e.name, e.site.name): e for e in plan.edits}
    acted = {site.name for e in plan.edits for site in e.sites}
    for node in graph.nodes:
        added = addition_of(node)
        if added is None:
            continue
        kind, place = added.kind, added.site
        runtime_module = module.get_submodule(node.target) if node.op == "call_module" else None
        if kind in (Kind.SPLICE, Kind.MEASURE):
            edit = planned.get((str(added.regularizer), str(place)))
            ok = edit is not None and _runs(node, runtime_module, edit) and _reads_others(node, edit, module)
        elif kind == Kind.TRACK:
            ok = place in plan.tracked and isinstance(runtime_module, Track) and runtime_module.site == place
        elif kind == Kind.TOTAL:
            ok = node.target == f"{RULES}.{added.regularizer}"
        elif kind in (Kind.KEY, Kind.CLOCK, Kind.ATTACH):
            ok = node.target == f"{RULES}.{kind}"
        elif kind in (Kind.CLONE, Kind.COPY):
            ok = node.target in (torch.clone, layout.clone, apart) and place in acted | plan.tracked.keys() | placed.keeps.keys()
        else:
            ok = True
        if not ok:
            fail(f"{node.name} does not do what was planned.")
        if kind in (Kind.SPLICE, Kind.MEASURE, Kind.TOTAL):
            _takes_inputs(node, plan.regularizers[str(added.regularizer)], kind)
        if kind in (Kind.SPLICE, Kind.TOTAL) and plan.regularizers[str(added.regularizer)].is_scheduled != _takes_clock(node):
            fail(f"{node.name} does not take the strengths of the call from the clock.")
        if kind == Kind.ATTACH:
            totals = [(n, a.regularizer) for n in graph.nodes if (a := addition_of(n)) is not None and a.kind == Kind.TOTAL]
            order = [n for name in plan.regularizers for n, of in totals if of == name]
            if list(node.args[1]) != order:
                fail("the penalties are attached in another order.")


def _runs(node: fx.Node, runtime_module: nn.Module | None, edit: Edit) -> bool:
    """Whether the node calls the runtime module that was made for an edit, with as many arguments as this module takes."""
    if not isinstance(runtime_module, (SpliceRule, Measure)) or len(node.args) != 1 + is_kind(node, Kind.SPLICE):
        return False
    return runtime_module.regularizer is edit.regularizer and runtime_module.site == edit.site.name


def _takes_inputs(node: fx.Node, regularizer: Regularizer, kind: Kind) -> None:
    """Check that a node that runs a formula gets those inputs of the model that the regularizer's options name, and a total no others."""
    wanted = regularizer.model_inputs if kind != Kind.TOTAL or _measures_in_total(regularizer) else {}
    for option, name in wanted.items():
        value = node.kwargs.get(option)
        if not isinstance(value, fx.Node) or value.op != "placeholder" or value.target != name:
            fail(f"{node.name} does not take the input {name!r} as {option}.")
    if kind == Kind.TOTAL and (strange := node.kwargs.keys() - {CLOCK, "places", "of", *wanted}):
        fail(f"{node.name} takes {min(strange)}, which is not in the plan.")


def _measures_in_total(regularizer: Regularizer) -> bool:
    return isinstance(regularizer, Penalty) and not measures(regularizer)


def _reads_others(node: fx.Node, edit: Edit, module: RewrittenModule) -> bool:
    """Whether a node has the right values as keyword arguments ``module_input`` and ``previous``, as far as its formula takes these.

    If the formula takes neither, the node may have no keyword argument except ``clock`` and the inputs of the model.

    ``module_input`` must be the value that the site's module got, or a replacement of this value; ``previous`` must be the state that the
    cell got.
    """
    value, takes = node.kwargs.get("module_input"), edit.regularizer.takes
    if not {"module_input", "previous"}.intersection(takes):
        return not node.kwargs.keys() - {CLOCK, *edit.regularizer.model_inputs}
    operations = Operations(module)
    wanted = state_before(site_nodes(node.graph, operations)[edit.site.name], operations) if "previous" in takes else None
    if node.kwargs.get("previous") is not wanted:
        return False
    if edit.module_input is None:
        return value is None
    while isinstance(value, fx.Node) and (earlier := replaced_by(value)) is not None:
        value = earlier
    return value is site_nodes(node.graph, operations).get(edit.module_input)


_NEED_NO_READER = (
    Kind.KEY, Kind.CLOCK, Kind.SPLICE, Kind.CLONE, Kind.COPY, Kind.TRACK, Kind.PARAMETER, Kind.REPLACED, Kind.LAYER,
    Kind.GRADIENTS,
)  # fmt: skip


def _reaches(graph: fx.Graph, plan: Plan, placed: Placed) -> None:
    """Check that additions are connected to the rest of the graph.

    Measurements, penalties and the nodes that attach them must reach the output, each splice must take the key of the call, and the output
    must have each penalty.
    """
    output = graph.output_node()
    upstream = _upstream(graph)
    additions = [(node, added) for node in graph.nodes if (added := addition_of(node)) is not None]
    keys = {node for node, added in additions if added.kind == Kind.KEY}
    if sum(added.kind == Kind.CLOCK for _, added in additions) != plan.is_scheduled:
        fail("it does not have one clock for its schedules.")
    totals: dict[str, fx.Node] = {}
    for node, added in additions:
        if (
            added.kind not in _NEED_NO_READER
            and node not in upstream
            and _used_site(node, upstream)
        ):
            fail(f"{node.name} does not reach the output.")
        if added.kind == Kind.SPLICE and (len(keys) != 1 or node.args[1] not in keys):
            fail(f"{node.name} does not take the key of the call.")
        if added.kind == Kind.TOTAL:
            totals[str(added.regularizer)] = node
    wanted = plan.penalties
    returned = output.args[0].penalties if isinstance(output.args[0], (Regularized, Kept)) else {n: totals.get(n) for n in wanted}
    if {n: totals.get(n) for n in wanted} != dict(returned) or None in returned.values():
        fail(f"the output does not carry exactly the penalties {wanted}.")
    for name, node in totals.items():
        _counts(node, name, plan, placed)


def _counts(node: fx.Node, name: str, plan: Plan, placed: Placed) -> None:
    """Check that a penalty's total reads each of its sites once: in the order of the plan, or by name if its formula takes all at once."""
    regularizer = plan.regularizers[name]
    edits = [e for e in plan.of(name) if any(site.kind == "parameter" or site.name in placed.where for site in e.sites)]
    if isinstance(regularizer, Splice):
        right = not node.args and not node.kwargs.keys() - {CLOCK, "of"}
    elif name in plan.slices:
        right = node.args == placed.derivative(name, edits)
    elif "values" in regularizer.takes:
        expected = {e.site.name: placed.read(e) for e in edits}
        right = node.args == (expected,)
    else:
        right = list(node.args) == [placed.added[name, e.site.name] for e in edits]
    if not right:
        fail(f"{name} does not add up each of its {len(edits)} sites once.")
    if node.kwargs.get("of") not in ([counts.get(name) for counts in plan.in_whole.values()] or [None]):
        fail(f"{name} is not averaged over its sites in the whole model.")


def _upstream(graph: fx.Graph) -> set[fx.Node]:
    """Return the nodes that the output depends on. ``_lint`` has made sure that a walk from the end meets readers first."""
    upstream = {graph.output_node()}
    for node in reversed(graph.nodes):
        if node in upstream:
            upstream.update(node.all_input_nodes)
    return upstream - {graph.output_node()}


def _used_site(node: fx.Node, upstream: set[fx.Node]) -> bool:
    """Whether the model uses the value that an addition replaces; True for an addition that replaces no value."""
    if not is_kind(node, Kind.SPLICE, Kind.CLONE):
        return True
    value = replaced_by(node)
    while value is not None and is_marked(value):
        value = replaced_by(value)
    return value is None or value in upstream
