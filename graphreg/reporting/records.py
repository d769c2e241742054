"""The records that a report consists of, and ``Report`` itself with its tables.

The records come first: ``Entry`` for a regularizer, ``Acted`` for a site and the regularizers that act there, ``NativeDropoutRow`` for a
native dropout, ``Cost`` for the cost. ``Report`` prints them. ``entries.py`` makes them.
"""
from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from graphreg.ir import Table
from graphreg.reporting.terminal import USUAL, Block, Lines, coloured, html, text, width_now

KEPT = "kept"
Does = Literal["replaces", "measures", "measures first"]  # "measures first": before the splices at its site


@dataclass(frozen=True)
class Entry:
    """A regularizer in a report.

    Attributes:
        name: Its name.
        type: The name of its class.
        acts_on: ``"values"`` or ``"parameters"``.
        strength: Its present weight or rate.
        selector: Its selector's strings, or the name of its function.
        options: Its options by name, as text or plain values.
        sites: The names of the sites that it acts at.
        of: The number of the model's values or parameters (according to ``acts_on``) that can be selected.
        share: The number of elements at its sites, divided by the number of elements at all ``of`` sites, in [0, 1]; None if some shape
            is not known.
        penalty: Whether it is a penalty, and not a splice.
        trains: For a penalty, the parameters that receive gradient from it; None for a splice, or if not known.
        frozen: For a penalty, the parameters that would receive gradient from it, but whose ``requires_grad`` is False.
        notes: Remarks, one clause each.
    """

    name: str
    type: str
    acts_on: str
    strength: float
    selector: tuple[str, ...]
    options: Mapping[str, Any]
    sites: tuple[str, ...]
    of: int
    share: float | None
    penalty: bool
    trains: tuple[str, ...] | None = None
    frozen: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Act:
    """What one regularizer does at a site.

    Attributes:
        regularizer: The regularizer's name.
        does: ``"replaces"``, ``"measures"``, or ``"measures first"``: before the value is replaced.
        strength: The present weight or rate.
        matched: The string of the selector that matched the site.
        gone: Whether a later pass removed the node that does this from the graph.
    """

    regularizer: str
    does: Does
    strength: float
    matched: str
    gone: bool = False


@dataclass(frozen=True)
class Acted:
    """A site in a report, with what acts there.

    Attributes:
        name: The site's name.
        kind: ``"value"`` or ``"parameter"``.
        op: The operation that makes the value.
        shape: The shape of the value or parameter; None if not known.
        dtype: The dtype of the value or parameter; None if not known.
        acts: What acts there, in order.
        calls: For a recurrent cell whose calls are the steps of one sequence, the number of calls; otherwise 1.
        graph: For a torch.compile backend, the index of the captured graph that has the site; otherwise None.
    """

    name: str
    kind: Literal["value", "parameter"]
    op: str
    shape: tuple[int, ...] | None
    dtype: str | None
    acts: tuple[Act, ...]
    calls: int = 1
    graph: int | None = None


@dataclass(frozen=True)
class NativeDropoutRow:
    """A native dropout in a report.

    Attributes:
        site: Its site's name.
        op: The name of the function or the module's class that it calls.
        rate: Its rate when the model was traced; None if not known.
        acts: When it acts: by ``"mode"``, that is, if its module is in train mode; ``"always"``; or ``"never"``.
        becomes: ``"off"``, ``"seeded"`` or ``"seeded at 0.1"`` if ``own_dropout=`` selected it, with the present rate if the rate has a
            schedule; ``"kept"`` if torch draws it as before.
        matched: The selector of ``own_dropout=`` that matched it; empty if none did.
        why_not: Why it cannot be moved to graphreg's streams; empty if it can.
    """

    site: str
    op: str
    rate: float | None
    acts: str
    becomes: str
    matched: str = ""
    why_not: str = ""


@dataclass(frozen=True)
class Cost:
    """The cost of the additions in one forward pass in train mode, in eager.

    Attributes:
        operations: Added operations, by regularizer or, for nodes that serve no single regularizer, by kind (``"keys"``, ``"copies"``).
            A matrix product or convolution counts its multiplications and additions; any other operation counts one for each element of
            its largest tensor.
        kept: Additional bytes that autograd saves for backward, by the same names; negative where it saves less than without additions.
        model_operations: The operations of the model without additions.
        model_kept: The bytes that autograd saves for backward in the model without additions.
    """

    operations: Mapping[str, int]
    kept: Mapping[str, int]
    model_operations: int
    model_kept: int


UNKNOWN = "unknown"
_SHOWN = 4  # the most names that a line lists
_PREFIXES = ("", "k", "M", "G", "T", "P")


@dataclass(frozen=True)
class Report:
    """What ``graphreg.report`` returns: which regularizer acts where, what it changes, and what it costs.

    ``str(report)`` is as wide as the terminal, or 80 columns; ``text(width)`` has no colours. ``to_dict()`` has all attributes.

    Attributes:
        title: The name of the model's class.
        made: How the graph was made: ``"traced by the symbolic front end"``.
        regularizers: The regularizers, in order.
        sites: The sites where something acts, in the order of the graph.
        own_dropout: The native dropouts.
        graphs: For a torch.compile backend, the captured graphs: index, code and modes of each.
        parameters: The number of parameter tensors of the model.
        cost: The cost of the additions; None if not known.
        no_cost: Why the cost is not known.
        missed: By regularizer, the strings of its selector that match nothing.
        notes: Remarks, one a line.
    """

    title: str
    made: str
    regularizers: tuple[Entry, ...]
    sites: tuple[Acted, ...]
    own_dropout: tuple[NativeDropoutRow, ...] = ()
    graphs: tuple[tuple[str, str, str], ...] = ()
    parameters: int = 0
    cost: Cost | None = None
    no_cost: str = ""
    missed: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def text(self, width: int | None = USUAL) -> str:
        """Return the report as plain text.

        ``width``: the columns to wrap at, 40 or more, or None to wrap nothing. Raises RegularizerError for any other value.
        """
        return text(self._blocks(), width)

    def __str__(self) -> str:
        return text(self._blocks(), width_now(), coloured())

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return html(self._blocks())

    def to_dict(self) -> dict[str, Any]:
        """Return plain values that ``json`` can write."""
        return asdict(self)

    def to_json(self, indent: int | None = 2) -> str:
        """Return the report as JSON; ``indent`` is that of ``json.dumps``."""
        return json.dumps(self.to_dict(), indent=indent)

    def _blocks(self) -> Iterator[Block]:
        yield Lines((self._heading(),), "bold")
        yield Table(("graph", "code", "modes"), self.graphs)
        yield _regularizers(self.regularizers)
        yield Lines(tuple(line for entry in self.regularizers if (line := self._notes_of(entry))))
        yield Table(("graph", "site", "op", "shape", "dtype", "what acts, in order", "matched by"), tuple(_rows(self.sites)))
        yield from _native_dropout(self.own_dropout)
        yield from _cost(self.cost, self.no_cost, bool(self.regularizers or self.own_dropout))
        yield Lines((*_missed(self.missed), *self._unknown(), *self.notes))

    def _heading(self) -> str:
        what = []
        if self.regularizers:
            places = [_counted(len({site.name for site in self.sites if site.kind == kind}), kind) for kind in ("value", "parameter")]
            at = " and ".join(text for text in places if not text.startswith("0 ")) or "no site"
            what.append(f"{_counted(len(self.regularizers), 'regularizer')} at {at}")
        if moved := [row for row in self.own_dropout if row.becomes != KEPT]:
            what.append(f"{_counted(len(moved), 'native dropout')} moved")
        return f"{self.title}, {self.made}: {'; '.join(what) or 'nothing acts'}"

    def _notes_of(self, entry: Entry) -> str:
        """Return the line below the table about one regularizer: what it trains, and its notes; empty if there is nothing to say."""
        notes = list(entry.notes)
        if entry.trains is not None:
            of = f"{len(entry.trains)} of {self.parameters} parameters"
            named = f"{', '.join(entry.trains)} ({of})" if 0 < len(entry.trains) <= _SHOWN else of
            notes.insert(0, f"trains {named if entry.trains else 'nothing'}{_frozen(entry.frozen)}")
        return f"{entry.name}: {'; '.join(notes)}" if notes else ""

    def _unknown(self) -> list[str]:
        if all(site.shape is not None for site in self.sites):
            return []
        return [f"{UNKNOWN}: the model was traced without example inputs; with example_inputs= shapes, dtypes, share and cost are shown"]


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _frozen(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"; frozen: {', '.join(names[:_SHOWN])}{more}" if names else ""


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
    """Yield a row for each regularizer at each site; the site's own columns are filled in its first row only."""
    strengths = {(act.regularizer, act.strength) for site in sites for act in site.acts}
    differing = {name for name, count in Counter(name for name, _ in strengths).items() if count > 1}
    for site in sites:
        name = site.name + (f" ({site.calls} calls)" if site.calls > 1 else "")
        columns = (
            "" if site.graph is None else str(site.graph),
            name,
            site.op,
            UNKNOWN if site.shape is None else "x".join(map(str, site.shape)),
            site.dtype or "",
        )
        for i, act in enumerate(site.acts):
            strength = f" {act.strength:g}" if act.regularizer in differing else ""
            yield (*(columns if i == 0 else ("",) * 5), act.regularizer + strength + " (gone)" * act.gone, act.matched)


def _native_dropout(rows: Sequence[NativeDropoutRow]) -> Iterator[Block]:
    if not rows:
        return
    cells = [(r.site, r.op, "" if r.rate is None else f"{r.rate:g}", r.acts, r.becomes, r.matched) for r in rows]
    yield Table(("native dropout", "op", "rate", "acts", "becomes", "matched by"), tuple(cells))
    lines = [f"not movable: {r.site}: {r.why_not}" for r in rows if r.why_not]
    unmoved = [r for r in rows if r.becomes == KEPT]
    if unmoved:
        move = "; own_dropout='seeded' moves what can be moved" if any(not r.why_not for r in unmoved) else ""
        lines.insert(0, f"{KEPT}: torch draws it, so set_rng_state does not resume it, frozen_noise does not freeze it, noise_on does not "
                        f"switch it on{move}")  # fmt: skip
    yield Lines(tuple(lines))


def _cost(cost: Cost | None, why_not: str, acts: bool) -> Iterator[Block]:
    if cost is None:
        if why_not and acts:
            yield Lines((f"cost: not known, because {why_not}",))
        return
    rows = [(name, amount(n), amount(cost.kept.get(name, 0), "B")) for name, n in cost.operations.items()]
    operations, kept = sum(cost.operations.values()), sum(cost.kept.values())
    rows.append((
        "together", amount(operations) + _beside(operations, cost.model_operations), amount(kept, "B") + _beside(kept, cost.model_kept)
    ))  # fmt: skip
    rows.append(("the model by itself", amount(cost.model_operations), amount(cost.model_kept, "B")))
    yield Table(("added to a forward pass", "operations", "kept for backward"), tuple(rows))


def _beside(added: int, base: int) -> str:
    return f" ({'+' * (added >= 0)}{percent(added / base)})" if base else ""


def _missed(missed: Mapping[str, tuple[str, ...]]) -> list[str]:
    return [f"matches nothing: {text!r} of {name}" for name, texts in missed.items() for text in texts]


def percent(share: float) -> str:
    """Format a share in percent: without decimals from 10 % on, with two significant digits below."""
    return f"{share:.0%}".replace("%", " %") if abs(share) >= 0.1 else f"{100 * share:.2g} %"


def amount(number: float, unit: str = "") -> str:
    """Format a number with three significant digits and an SI prefix: ``12.3 M``."""
    power = 0
    while abs(number) >= 999.5 and power < len(_PREFIXES) - 1:
        number, power = number / 1000, power + 1
    return f"{number:.3g} {_PREFIXES[power]}{unit}".rstrip()
