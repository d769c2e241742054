"""Makes the records of a report: one for each regularizer, each site where a regularizer acts, and each native dropout."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import MISSING, fields
from typing import Any

from graphreg.ir.random_ops import NativeDropout
from graphreg.ir.selector import strings
from graphreg.ir.site import Site, dtype_text
from graphreg.planning.matching import SiteCounts, count_of
from graphreg.planning.native_dropout import NativeDropoutEdit
from graphreg.planning.plan import Edit
from graphreg.planning.repeats import Strengths
from graphreg.regularizer.base import Penalty, Regularizer, Splice
from graphreg.reporting.records import KEPT, Act, Acted, Does, Entry, NativeDropoutRow

# The names of the parameters that a penalty's value depends on (gradient_reach.py): first those
# with requires_grad, then the frozen ones.
Trained = tuple[tuple[str, ...], tuple[str, ...]]
# fields with columns of their own in a report, which "options" leaves out
_WITH_COLUMN = ("pattern", "weight", "name")
# Fields that many classes have: those of the base classes, and some others. A ``time_axis`` at its default is read from the value.
_SHARED = {field.name for kind in (Regularizer, Splice, Penalty) for field in fields(kind)} | {"share_axes", "by", "time_axis"}
# of a penalty that takes ``counted``, they mean nothing without lengths
_OF_LENGTHS = {"lengths", "time_axis"}
_ORDER: tuple[Does, ...] = ("measures first", "replaces", "measures", "changes")


def entry(
    name: str, regularizer: Regularizer, sites: Sequence[Site], strength: float, totals: SiteCounts,
    trained: Trained | None = None, notes: Iterable[str] = (), by_site: str = "", here: float = 1.0,
) -> Entry:  # fmt: skip
    """Make the record of one regularizer, which acts at ``sites``.

    Args:
        name: The regularizer's name.
        regularizer: The regularizer.
        sites: The sites.
        strength: The current strength.
        totals: How many values and parameters of the model can be selected, and how many elements
            these have.
        trained: The parameters that the regularizer's penalty depends on, in two tuples: those that
            the penalty trains, and the frozen ones. None if the regularizer has no penalty, or if
            the parameters are not known.
        notes: Remarks; empty ones are left out.
        by_site: The strengths as text, such as ``0 to 0.2``, if they differ by site; else ``""``.
        here: For a stage of a pipeline, the share of the penalty's sites that are in this stage;
            else 1.
    """
    every, chosen = totals.of(regularizer.on), count_of(sites)
    share = chosen.elements / every.elements if chosen.elements is not None and every.elements else None
    note = f"strength {by_site} by site" if by_site else regularizer.note(sites, strength * here) if sites else ""
    return Entry(
        name, type(regularizer).__name__, regularizer.on, strength, selector_of(regularizer), options_of(regularizer),
        tuple(site.name for site in sites), every.sites, share, isinstance(regularizer, Penalty),
        trained[0] if trained else None, trained[1] if trained else (),
        tuple(filter(None, (*notes, note))),
    )  # fmt: skip


def acted(edits: Iterable[Edit], strengths: Strengths, there: Collection[tuple[str, str]], graph: int | None = None) -> list[Acted]:
    """Make a record of each site that has an edit. The record lists the regularizers in the order in which they act.

    ``there``: the pairs (regularizer, site) whose nodes are still in the graph. ``graph``: the
    number of the graph that has the sites, if a torch.compile backend captured several graphs.
    """
    by_site: dict[str, list[Edit]] = {}
    for edit in edits:
        by_site.setdefault(edit.site.name, []).append(edit)
    records = []
    for name, at_site in by_site.items():
        site, calls = at_site[0].site, max(len(edit.sites) for edit in at_site)
        acts = [_act(e, strengths, (e.name, name) not in there) for e in at_site]
        acts.sort(key=lambda act: _ORDER.index(act.does))
        records.append(Acted(name, site.kind, site.op, site.shape, dtype_text(site) or None, tuple(acts), calls, graph))
    return records


def _act(edit: Edit, strengths: Strengths, gone: bool) -> Act:
    strength = strengths.get((edit.name, edit.site.name), strengths[edit.name])
    is_clean = isinstance(edit.regularizer, Penalty) and edit.regularizer.clean
    does: Does = "replaces" if not isinstance(edit.regularizer, Penalty) else "measures first" if is_clean else "measures"
    does = "changes" if edit.regularizer.by_prox else does
    return Act(edit.name, does, strength, edit.matched, gone)


def native_dropout_rows(
    edits: Iterable[NativeDropoutEdit], unmoved: Iterable[NativeDropout], rates: Mapping[str, float] | None = None
) -> tuple[NativeDropoutRow, ...]:
    """Make the records of native dropouts: first of those that ``own_dropout=`` selected, then of the others.

    ``unmoved``: the others, which still draw from torch's generator. ``rates``: the current rate of
    each native dropout whose rate has a schedule, by the name of its site.
    """
    rows = []
    for e in edits:
        site, now = e.dropout.site, f", now {rates[e.dropout.site.name]:g}" if rates and e.dropout.site.name in rates else ""
        rows.append(NativeDropoutRow(site.name, site.op, e.dropout.rate, e.dropout.when, e.action + now, e.matched))
    return (*rows, *(NativeDropoutRow(d.site.name, d.site.op, d.rate, d.when, KEPT, "", d.why_not) for d in unmoved))


def selector_of(regularizer: Regularizer) -> tuple[str, ...]:
    """Return the strings of a regularizer's selector. If the selector is a function, return the name of the function instead."""
    return strings(regularizer.pattern) or (str(_plain(regularizer.pattern)),)


def options_of(regularizer: Regularizer) -> dict[str, Any]:
    """Return a regularizer's options: all fields that only its class has, and the fields in ``_SHARED`` that are not at their default."""
    idle = _OF_LENGTHS if "counted" in regularizer.takes and regularizer.engine_options.lengths is None else set[str]()
    options = [field for field in fields(regularizer) if field.name not in {*_WITH_COLUMN, *idle}]
    values = {field.name: getattr(regularizer, field.name) for field in options}
    factories = {field.name: field.default_factory for field in options if field.default_factory is not MISSING}
    defaults = {field.name: factories[field.name]() if field.name in factories else field.default for field in options}
    shown = [name for name, value in values.items() if name not in _SHARED or value != defaults[name]]
    return {name: _plain(values[name]) for name in shown}


def _plain(value: Any) -> Any:
    """Convert a value to plain data for JSON.

    A function becomes its name, and any other object the name of its class, both in angle brackets.
    """
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return f"<{getattr(value, '__name__', type(value).__name__)}>"
