"""What ``report`` gives: accounts of regularizers, of sites and of what they cost; as text, as a dict, as HTML."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from graphreg.accounts import KEPT, Acted, Cost, Entry, OwnRow
from graphreg.notebook import html
from graphreg.screen import USUAL, Block, Lines, Table, coloured, text, width_now

UNKNOWN = "unknown"
_SHOWN = 4  # names in a line
_PREFIXES = ("", "k", "M", "G", "T", "P")


@dataclass(frozen=True)
class Report:
    """Which regularizer acts where, what it changes, and what it costs.

    It prints for the screen: at the terminal's width, or 80 columns. ``text(width)`` is plain; ``to_dict()`` and ``to_json()``
    have everything. ``cost`` is None where it is not known, and ``no_cost`` says why.
    """

    title: str
    made: str
    regularizers: tuple[Entry, ...]
    sites: tuple[Acted, ...]
    own_dropout: tuple[OwnRow, ...] = ()
    graphs: tuple[tuple[str, str, str], ...] = ()
    parameters: int = 0
    cost: Cost | None = None
    no_cost: str = ""
    missed: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def text(self, width: int | None = USUAL) -> str:
        """Plain text; ``width``: 40 columns or more, or None for lines that are not wrapped. Raises RegularizerError below 40."""
        return text(self._blocks(), width)

    def __str__(self) -> str:
        return text(self._blocks(), width_now(), coloured())

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return html(self._blocks())

    def to_dict(self) -> dict[str, Any]:
        """Plain values alone: what ``json`` takes."""
        return asdict(self)

    def to_json(self, indent: int | None = 2) -> str:
        return json.dumps(self.to_dict(), indent=indent)

    def _blocks(self) -> Iterator[Block]:
        yield Lines((self._heading(),), "bold")
        yield Table(("graph", "code", "modes"), self.graphs)
        yield _regularizers(self.regularizers)
        yield Lines(tuple(line for entry in self.regularizers if (line := self._about(entry))))
        yield Table(("graph", "site", "op", "shape", "dtype", "what acts, in order", "matched by"), tuple(_rows(self.sites)))
        yield from _own(self.own_dropout)
        yield from _cost(self.cost, self.no_cost, bool(self.regularizers or self.own_dropout))
        yield Lines((*_missed(self.missed), *self._unknown(), *self.notes))

    def _heading(self) -> str:
        what = []
        if self.regularizers:
            places = [_counted(len({site.name for site in self.sites if site.kind == kind}), kind) for kind in ("value", "parameter")]
            at = " and ".join(text for text in places if not text.startswith("0 ")) or "no site"
            what.append(f"{_counted(len(self.regularizers), 'regularizer')} at {at}")
        if moved := [row for row in self.own_dropout if row.becomes != KEPT]:
            what.append(f"{len(moved)} of its own dropouts moved")
        return f"{self.title}, {self.made}: {'; '.join(what) or 'nothing acts'}"

    def _about(self, entry: Entry) -> str:
        """What no column of a table holds."""
        notes = list(entry.notes)
        if entry.trains is not None:
            of = f"{len(entry.trains)} of {self.parameters} parameters"
            named = f"{', '.join(entry.trains)} ({of})" if 0 < len(entry.trains) <= _SHOWN else of
            notes.insert(0, f"trains {named if entry.trains else 'nothing'}{_frozen(entry.frozen)}")
        return f"{entry.name}: {'; '.join(notes)}" if notes else ""

    def _unknown(self) -> list[str]:
        if all(site.shape is not None for site in self.sites):
            return []
        return [f"{UNKNOWN}: the model was traced without example inputs; with example_inputs= shapes, dtypes, share and cost are told"]


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _frozen(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f", frozen {'is' if len(names) == 1 else 'are'} {', '.join(names[:_SHOWN])}{more}" if names else ""


def _regularizers(entries: Sequence[Entry]) -> Table:
    rows = [
        (
            e.name, e.type, f"{e.strength:g}", ", ".join(e.selector), ", ".join(f"{name}={value!r}" for name, value in e.options.items()),
            f"{len(e.sites)} of {_counted(e.of, e.acts_on.removesuffix('s'))}", UNKNOWN if e.share is None else percent(e.share),
        )
        for e in entries
    ]  # fmt: skip
    return Table(("regularizer", "class", "strength", "selector", "options", "sites", "share"), tuple(rows))


def _rows(sites: Sequence[Acted]) -> Iterator[tuple[str, ...]]:
    """A line for each thing that acts; the site stands in the first."""
    for site in sites:
        name = site.name + (f" ({site.calls} calls)" if site.calls > 1 else "")
        about = (
            "" if site.graph is None else str(site.graph),
            name,
            site.op,
            UNKNOWN if site.shape is None else "x".join(map(str, site.shape)),
            site.dtype or "",
        )
        for i, act in enumerate(site.acts):
            yield (*(about if i == 0 else ("",) * 5), act.regularizer + " (gone)" * act.gone, act.matched)


def _own(rows: Sequence[OwnRow]) -> Iterator[Block]:
    if not rows:
        return
    cells = [(r.site, r.op, "" if r.rate is None else f"{r.rate:g}", r.acts, r.becomes, r.matched) for r in rows]
    yield Table(("the model's own dropout", "op", "rate", "acts", "becomes", "matched by"), tuple(cells))
    lines = [f"not movable: {r.site}: {r.why_not}" for r in rows if r.why_not]
    kept = [r for r in rows if r.becomes == KEPT]
    if kept:
        move = "; own_dropout='seeded' moves what can be moved" if any(not r.why_not for r in kept) else ""
        lines.insert(0, f"{KEPT}: torch draws it, so set_rng_state does not resume it, frozen_noise does not hold it, noise_on does not "
                        f"switch it on{move}")  # fmt: skip
    yield Lines(tuple(lines))


def _cost(cost: Cost | None, why_not: str, acts: bool) -> Iterator[Block]:
    if cost is None:
        if why_not and acts:
            yield Lines((f"cost: not known, for {why_not}",))
        return
    rows = [(name, amount(n), amount(cost.kept.get(name, 0), "B")) for name, n in cost.operations.items()]
    operations, kept = sum(cost.operations.values()), sum(cost.kept.values())
    rows.append((
        "together", amount(operations) + _beside(operations, cost.model_operations), amount(kept, "B") + _beside(kept, cost.model_kept)
    ))  # fmt: skip
    rows.append(("the model by itself", amount(cost.model_operations), amount(cost.model_kept, "B")))
    yield Table(("added to a forward pass", "operations", "kept for backward"), tuple(rows))


def _beside(part: int, whole: int) -> str:
    return f" ({'+' * (part >= 0)}{percent(part / whole)})" if whole else ""


def _missed(missed: Mapping[str, tuple[str, ...]]) -> list[str]:
    return [f"matches nothing: {text!r} of {name}" for name, texts in missed.items() for text in texts]


def percent(share: float) -> str:
    """A share in percent: whole ones, below 10 % two digits."""
    return f"{share:.0%}".replace("%", " %") if abs(share) >= 0.1 else f"{100 * share:.2g} %"


def amount(number: float, unit: str = "") -> str:
    """A number in three digits and thousands: 12.3 M."""
    power = 0
    while abs(number) >= 999.5 and power < len(_PREFIXES) - 1:
        number, power = number / 1000, power + 1
    return f"{number:.3g} {_PREFIXES[power]}{unit}".rstrip()
