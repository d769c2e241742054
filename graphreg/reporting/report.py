"""``graphreg.report`` shows where each regularizer acts, which parameters its penalty trains, and what it costs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, fx

from graphreg.compiler.settings import changed_settings
from graphreg.errors import GraphRegError, listed
from graphreg.ir.metadata import addition_of, own_name
from graphreg.ir.shape_guards import fixed
from graphreg.planning.native_dropout import OWN_DROPOUT
from graphreg.planning.plan import Plan
from graphreg.planning.practically_off import practically_off
from graphreg.planning.repeats import Strengths
from graphreg.regularizer.base import Regularizer, Splice
from graphreg.regularizer.by_depth import ByDepth
from graphreg.reporting.cost import cost as measured
from graphreg.reporting.decayed_too import decayed_too
from graphreg.reporting.entries import acted, entry, native_dropout_rows
from graphreg.reporting.gradient_reach import trained
from graphreg.reporting.records import Acted, Cost, Entry, KeptRow, Report
from graphreg.rewriting.instantiate import measures
from graphreg.rewriting.rewrite import rewrite
from graphreg.runtime.attach import AttachRule
from graphreg.runtime.clock import clock_of
from graphreg.runtime.distributed_values import whole
from graphreg.runtime.rank_mesh import batch_notes, rank_notes
from graphreg.runtime.rewritten_module import RewrittenModule, lowering
from graphreg.session.controls import Regulated, changed_strengths, site_strengths, strengths_now
from graphreg.session.hosts import backend_host, graphs_of, in_place_host, native_draws, record_of, rewritten, rules_of
from graphreg.session.strengths import OWN, strength_text
from graphreg.torch_internals.modules import parameters_by_name
from graphreg.tracing.proof.proof import MODES, NO_INPUTS
from graphreg.tracing.shape_decisions import decisions


def report(module: Regulated | Plan, cost: bool = True) -> Report:
    """Report where each regularizer acts, its current strength, which parameters its penalty trains, and what it costs.

    Args:
        module: A rewritten module, which may be compiled or wrapped; a model that is regularized in place; a torch.compile backend of
            graphreg, or a model compiled with such a backend; or a plan, which is reported as if it were applied.
        cost: Whether to measure the cost. The measurement runs the model twice on meta tensors. A backend's report leaves the cost out.

    Returns:
        A ``Report``, which prints as tables, and has ``text(width)``, ``to_dict()`` and ``to_json()``.

    Raises:
        GraphRegError: ``module`` is an object of another kind, or a plan without its traced model.
    """
    if isinstance(module, Plan):
        return replace(_of_module(applied(module), cost), made="planned and not applied yet")
    if (backend := backend_host(module)) is not None:
        made: Report = backend.report()
        return made
    return _of_module(module, cost)


def applied(plan: Plan) -> RewrittenModule:
    """Return the rewritten module that a plan describes, for reports and diffs. The plan's model is not changed."""
    if plan.traced is None:
        raise GraphRegError(f"this plan for {plan.title} has no traced model with it. Give what graphreg.plan(traced, ...) returned.")
    return rewrite(plan.traced, plan, rng=0)


def _of_module(module: Regulated, with_cost: bool) -> Report:
    record = record_of(module)
    plan = record.plan
    inner = rewritten(module)
    graphs = graphs_of(inner)
    now = strengths_now(module)
    sites = _sites(plan, now, graphs)
    measured_cost, why_not = _cost(inner, plan) if with_cost else (None, "")

    # The notes on the graph come first, then those on what the module does when it is called.
    notes = [
        f"gone: {act.regularizer} at {site.name} (a later pass took it out of the graph)" for site in sites for act in site.acts if act.gone
    ]
    notes += [*plan.repeated(now), *plan.harms(now)]
    notes += [plan.blocks_text] if plan.blocks else []
    notes += [plan.off_text] if plan.off_text else []
    notes += [f"opaque module: {path} ({reason})" for path, reason in record.opaque.items()]
    notes += [f"specialized argument: {name}={value!r}" for name, value in record.specialized.items()]
    asserted = dict.fromkeys(line for graph in graphs.values() for line in (*decisions(graph), *fixed(graph)))
    notes += [*record.notes, *asserted, *_unproved(rules_of(module).unproved)]

    if isinstance(attached := rules_of(module)._modules.get("attach"), AttachRule):
        scale = attached.describe_scale()
        notes.append(f"attached: backward adds the gradient of the penalties, {scale}; if the output has a loss, they are added to that")
    if (clock := clock_of(rules_of(module))) is not None:
        notes.append(f"schedules: {clock.call()} calls in train mode so far")

    notes += [*rank_notes(rules_of(module)), *batch_notes(inner, rules_of(module), plan)]
    notes += placed.notes() if (placed := in_place_host(module)) is not None else []
    notes += lowering(inner).report_lines() if isinstance(inner, RewrittenModule) else []
    notes += decayed_too(plan, parameters_by_name(inner))

    native = native_dropout_rows(plan.native_dropout, native_draws(module), site_strengths(module).get(OWN_DROPOUT))
    entries = _entries(plan, now, inner, changed_strengths(module))
    return Report(
        plan.title, f"traced by the {record.front_end} front end", entries, tuple(sites), native, (),
        len(parameters_by_name(inner, once=True)), measured_cost, why_not, plan.missed, (*notes, *_settings(module)),
        tuple(KeptRow(*each.row) for each in plan.kept),
    )  # fmt: skip


def _entries(plan: Plan, now: Strengths, inner: fx.GraphModule, chosen: Mapping[str, Any]) -> tuple[Entry, ...]:
    """Return the records of the regularizers. ``chosen``: the strengths that were set after the rewrite, from ``changed_strengths``."""
    gradient_reach, parameters = trained(inner, graphs_of(inner)), parameters_by_name(inner)
    entries = []
    for name, regularizer in plan.regularizers.items():
        edits, zeros = plan.of(name), ""
        if regularizer.by_prox:
            changed = {edit.site.name: parameters[edit.site.name] for edit in edits if edit.site.name in parameters}
            zeros = _zeros(changed.values())
            gradient_reach[name] = tuple(n for n, p in changed.items() if p.requires_grad), tuple(
                n for n, p in changed.items() if not p.requires_grad
            )
        strengths = [(edit.site, now.get((name, edit.site.name), now[name])) for edit in edits]
        faint = plan.cautions.get(name) or practically_off(regularizer, strengths, plan.whole(name))
        notes = [_averages(plan, name), plan.note(name), _schedule(regularizer, chosen.get(name)), faint, zeros]

        # A key (name, site) is there only where the strength of a site differs from the name's.
        by_site = strength_text(name, now) if any(isinstance(key, tuple) and key[0] == name for key in now) else ""
        share = len(edits) / of if (of := plan.whole(name)) else 1.0
        sites = [site for edit in edits for site in edit.sites]
        entries.append(entry(name, regularizer, sites, now[name], plan.site_counts, gradient_reach.get(name), notes, by_site, share))
    return tuple(entries)


def _zeros(parameters: Iterable[Tensor]) -> str:
    """Say how a penalty with ``by="prox"`` acts, and how many weights of its parameters are exactly 0, if they have values."""
    known = [whole(parameter.detach()) for parameter in parameters if parameter.device.type != "meta"]
    zeros, of = sum(int((each == 0).sum()) for each in known), sum(each.numel() for each in known)
    count = f"; {zeros:,} of {of:,} weights are exactly 0 ({zeros / of:.1%})" if of else ""
    return f"not in penalties: graphreg.prox_ applies it after the optimizer's step{count}"


def _unproved(unproved: Mapping[str, str]) -> list[str]:
    """Return a note for each reason why a graph was not compared with the model. A module that waits for its first call has none yet."""
    modes: dict[str, list[str]] = {}
    for mode, reason in unproved.items():
        modes.setdefault(reason, []).append(mode)
    named = {reason: [name for name in names if name in MODES] for reason, names in modes.items() if reason != NO_INPUTS}
    notes = [f"not proved in {' and '.join(names)} mode: {reason}" for reason, names in named.items() if names]
    return notes + [f"not proved in {name}: {why}" for name, why in unproved.items() if name not in MODES and why != NO_INPUTS]


def _schedule(regularizer: Regularizer, chosen: Mapping[str, float] | None) -> str:
    """Return a note on the schedule of a regularizer; ``""`` if it has none. ``chosen``: the strengths set after the rewrite, by site."""
    if not regularizer.is_scheduled:
        return ""
    # A strength that was set back to the schedule counts as not set.
    if chosen and dict(chosen) != {OWN: regularizer.weight}:
        return f"made with the schedule {regularizer.weight!r}, and set since"
    # ``Plan.note`` describes a strength by depth.
    return "" if isinstance(regularizer.weight, ByDepth) else f"schedule {regularizer.weight!r}"


def _averages(plan: Plan, name: str) -> str:
    """Return how the measurements of a penalty at its sites are combined, such as ``mean over 2 values``; ``""`` if they are not."""
    regularizer, count = plan.regularizers[name], len(plan.of(name))
    if not regularizer.has_penalty() or "values" in regularizer.takes or regularizer.takes_vjp:
        return ""
    if of := plan.whole(name):
        return f"its share, {count} of {of}, in the mean over the {regularizer.on} of the whole model"
    return f"{regularizer.engine_options.reduction} over {count} {regularizer.on}" if count > 1 else ""


def _sites(plan: Plan, now: Strengths, graphs: dict[str, fx.Graph]) -> list[Acted]:
    """Return the records of the sites where a regularizer acts: values in the order of the graph, then parameters."""
    there = {(a.regularizer or "", a.site or "") for g in graphs.values() for n in g.nodes if (a := addition_of(n)) is not None}
    penalties = [edit for edit in plan.edits if edit.site.kind == "value" and not isinstance(edit.regularizer, Splice)]
    at_once = {edit.name for edit in penalties if not measures(edit.regularizer)}
    # A penalty that takes all its values at once has a single node, which names no site, and one with by="prox" has no node. So their
    # sites count as present without a check.
    there |= {(edit.name, edit.site.name) for edit in plan.edits if edit.name in at_once or edit.regularizer.by_prox}
    places = [name for g in graphs.values() for n in g.nodes if (name := own_name(n))]
    # In reverse, so that the first place of a name counts: it may be in the graphs of both modes.
    order = {name: i for i, name in reversed(list(enumerate(places)))}
    return sorted(acted(plan.edits, now, there), key=lambda site: (site.kind == "parameter", order.get(site.name, len(places))))


def _cost(inner: fx.GraphModule, plan: Plan) -> tuple[Cost | None, str]:
    """Return the cost and ``""``, or None and the reason why the cost is not known."""
    try:
        return measured(inner, plan), ""
    except GraphRegError as error:
        return None, str(error)


def _settings(module: Regulated) -> Sequence[str]:
    """Return a note on the settings of torch that are not at their default and may make the masks of native dropout wrong."""
    settings, native = changed_settings(), native_draws(module)
    if not settings or not native:
        return []
    names = listed([each.site.name for each in native])
    return [f"settings: {', '.join(map(str, settings))}: the masks of {names} depend on these; graphreg.doctor(module) tests them"]
