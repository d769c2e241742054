"""The report: which regularizer acts where, as text."""

from __future__ import annotations

from torch import fx

from graphreg.control import Regulated, strengths
from graphreg.decisions import decisions
from graphreg.diagnosis import listed
from graphreg.inside import graphs_of, own_draws, rewritten, rules_of
from graphreg.knobs import knobs_of
from graphreg.leaves import measures
from graphreg.module import RewrittenModule
from graphreg.own_choice import table
from graphreg.plan import Plan
from graphreg.regularizer import Splice
from graphreg.settings import changed
from graphreg.sites import columns, dtype_text, shape_text
from graphreg.sizes import fixed


def report(module: Regulated) -> str:
    """A text table: site, op, shape, regularizer, strength, the string that matched; and a line a regularizer.

    Strengths are the present ones; of a backend, the graphs come first. Raises GraphRegError for a module graphreg did not rewrite.
    """
    if (knobs := knobs_of(module)) is not None:
        return knobs.report()
    plan, leaves, held, front_end, notes = rules_of(module).about
    now, inner = strengths(module), rewritten(module)
    rows = [
        (
            e.place,
            e.site.op,
            shape_text(e.site),
            dtype_text(e.site),
            f"{type(e.regularizer).__name__} {e.name}",
            f"{now[e.name]:g}",
            e.matched,
        )
        for e in plan.edits
    ]
    head = ("site", "op", "shape", "dtype", "regularizer", "strength", "matched by")
    lines = [
        f"{plan.title}, traced by the {front_end} front end: {len(plan.edits)} edits",
        *([columns(head, rows)] if rows or not plan.own else []),
        "",
    ]
    lines += _by_regularizer(plan, now)
    lines += table(plan.own, plan.stays)
    lines += _gone(plan, list(graphs_of(rewritten(module)).values()))
    lines += [f"kept whole: {path} ({reason})" for path, reason in leaves.items()]
    lines += [f"held: {name}={value!r}" for name, value in held.items()]
    first = next(iter(graphs_of(inner).values()))
    lines += [*notes, *decisions(first), *fixed(first)]
    lines += inner.lowering().told() if isinstance(inner, RewrittenModule) else []
    lines += _settings(module)
    return "\n".join(lines).rstrip()


def _settings(module: Regulated) -> list[str]:
    """The model's own draws, where torch's settings decide of them."""
    settings, own = changed(), own_draws(module)
    if not settings or not own:
        return []
    names = listed([each.site.name for each in own])
    return [f"settings: {', '.join(map(str, settings))}: they decide of the masks of {names}; graphreg.doctor(module) tests these"]


def _by_regularizer(plan: Plan, now: dict[str, float]) -> list[str]:
    lines = []
    for name, regularizer in plan.regularizers.items():
        sites = [edit.site for edit in plan.of(name)]
        note = regularizer.note(sites, now[name]) if sites else ""
        if name in plan.cones:
            note = f"{plan.cones[name].note()}; {note}" if note else plan.cones[name].note()
        count = f"{len(sites)} site{'s' * (len(sites) != 1)}"
        lines.append(
            f"{name}: {type(regularizer).__name__} {now[name]:g} on {regularizer.pattern!r}, {count}" + (f"; {note}" if note else "")
        )
    return lines


def _gone(plan: Plan, graphs: list[fx.Graph]) -> list[str]:
    """The edits that a later pass has taken out: where a site's value had no use, or somebody's own edit of the graph."""
    there = {(a.get("regularizer"), a.get("site")) for graph in graphs for n in graph.nodes if (a := n.meta.get("graphreg"))}
    edits = [e for e in plan.edits if isinstance(e.regularizer, Splice) or measures(e.regularizer) or e.site.kind == "parameter"]
    return [f"gone: {e.name} at {e.site.name} (a later pass took it out of the graph)" for e in edits if (e.name, e.site.name) not in there]
