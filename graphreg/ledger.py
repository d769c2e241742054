"""The ledger: a plan's edits entered as accounts, for the report of a module, of a plan, of a backend."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, fields
from typing import Any

from graphreg.accounts import KEPT, Act, Acted, Does, Entry, OwnRow
from graphreg.census import Census, counted
from graphreg.own_choice import OwnEdit
from graphreg.own_dropout import Own
from graphreg.plan import Edit
from graphreg.regularizer import Penalty, Regularizer, Splice
from graphreg.selector import strings
from graphreg.sites import Site, dtype_text

Trained = tuple[tuple[str, ...], tuple[str, ...]]  # the parameters that train, and those that are frozen
_TOLD = ("pattern", "weight", "name")  # fields that have a column of their own
_SHARED = {field.name for kind in (Regularizer, Splice, Penalty) for field in fields(kind)}
_ORDER: tuple[Does, ...] = ("measures first", "replaces", "measures")


def entry(
    name: str, regularizer: Regularizer, sites: Sequence[Site], strength: float, census: Census,
    trained: Trained | None = None, notes: Iterable[str] = (),
) -> Entry:  # fmt: skip
    """The account of one regularizer."""
    whole, own = census.of(regularizer.on), counted(sites)
    share = own.elements / whole.elements if own.elements is not None and whole.elements else None
    return Entry(
        name, type(regularizer).__name__, regularizer.on, strength, selector_of(regularizer), options_of(regularizer),
        tuple(site.name for site in sites), whole.sites, share, isinstance(regularizer, Penalty),
        trained[0] if trained else None, trained[1] if trained else (),
        tuple(filter(None, (*notes, regularizer.note(sites, strength) if sites else ""))),
    )  # fmt: skip


def acted(
    edits: Iterable[Edit], strengths: Mapping[str, float], there: Collection[tuple[str, str]], graph: int | None = None
) -> list[Acted]:
    """The sites, each with what acts there in order. ``there``: the (name, site) that are still in the graph."""
    found: dict[str, list[Edit]] = {}
    for edit in edits:
        found.setdefault(edit.site.name, []).append(edit)
    accounts = []
    for name, own in found.items():
        site, calls = own[0].site, max(len(edit.sites) for edit in own)
        acts = [Act(e.name, _does(e.regularizer), strengths[e.name], e.matched, (e.name, name) not in there) for e in own]
        acts.sort(key=lambda act: _ORDER.index(act.does))
        accounts.append(Acted(name, site.kind, site.op, site.shape, dtype_text(site) or None, tuple(acts), calls, graph))
    return accounts


def own_rows(edits: Iterable[OwnEdit], kept: Iterable[Own]) -> tuple[OwnRow, ...]:
    """The model's own dropouts: what became of those that were chosen, and those that draw as they did."""
    rows = [OwnRow(e.own.site.name, e.own.site.op, e.own.rate, e.own.when, e.becomes, e.matched) for e in edits]
    return (*rows, *(OwnRow(own.site.name, own.site.op, own.rate, own.when, KEPT, "", own.why_not) for own in kept))


def _does(regularizer: Regularizer) -> Does:
    if not isinstance(regularizer, Penalty):
        return "replaces"
    return "measures first" if regularizer.clean else "measures"


def selector_of(regularizer: Regularizer) -> tuple[str, ...]:
    """Its strings, or its function by name."""
    return strings(regularizer.pattern) or (str(_plain(regularizer.pattern)),)


def options_of(regularizer: Regularizer) -> dict[str, Any]:
    """Those of its class; of those that all have, the ones that are not at their default."""
    own = [field for field in fields(regularizer) if field.name not in _TOLD]
    given = {field.name: getattr(regularizer, field.name) for field in own}
    return {field.name: _plain(given[field.name]) for field in own if field.name not in _SHARED or given[field.name] != _default(field)}


def _default(field: Field[Any]) -> Any:
    return field.default_factory() if field.default_factory is not MISSING else field.default


def _plain(value: Any) -> Any:
    """What JSON can hold: anything else by its name."""
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return f"<{getattr(value, '__name__', type(value).__name__)}>"
