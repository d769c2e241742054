"""Defines the records of a report, and ``Report``, which prints them as tables.

The records are ``Entry`` for a regularizer, ``Acted`` for a site and the regularizers that act
there, ``NativeDropoutRow`` for a native dropout, and ``Cost`` for the cost. ``entries.py`` makes
all records except ``Cost``, which ``cost.py`` makes.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, field
from typing import Any, ClassVar, Literal

from graphreg.ir.terminal import Lines, Paragraph, Printed
from graphreg.ir.text_table import Table
from graphreg.planning.kept import HEADINGS

KEPT = "kept"
# "measures first": before the splices at the same site
Does = Literal["replaces", "measures", "measures first", "changes"]


@dataclass(frozen=True)
class Entry:
    """A regularizer in a report.

    Attributes:
        name: Its name.
        type: The name of its class.
        acts_on: ``"values"`` or ``"parameters"``.
        strength: Its current weight or rate.
        selector: The strings of its selector; the name of the selector if it is a function.
        options: Its options by name, as text or plain values.
        sites: The names of the sites that it acts at.
        of: The number of values of the model (of parameters, if it acts on parameters) that can be
            selected.
        share: The number of elements at its sites, divided by the number of elements at all ``of``
            sites, in [0, 1]; None if some shape is not known.
        penalty: Whether it is a penalty, and not a splice.
        trains: The parameters that receive a gradient from its penalty, or that ``prox_`` changes.
            None if it has no penalty, or if the parameters are not known.
        frozen: The parameters that would receive a gradient from its penalty if their
            ``requires_grad`` were not False.
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
    """The action of one regularizer at one site.

    Attributes:
        regularizer: The regularizer's name.
        does: ``"replaces"``, ``"measures"``, or ``"measures first"``, that is, before a splice
            replaces the value; ``"changes"`` for a penalty with ``by="prox"``, of which ``prox_``
            changes the parameter.
        strength: The current weight or rate.
        matched: The string of the selector that matched the site.
        gone: Whether a later torch.fx pass removed the node of this action from the graph.
    """

    regularizer: str
    does: Does
    strength: float
    matched: str
    gone: bool = False


@dataclass(frozen=True)
class Acted:
    """A site in a report, with the regularizers that act there.

    Attributes:
        name: The site's name.
        kind: ``"value"`` or ``"parameter"``.
        op: The operation that computes the value; for a parameter, the class of its module.
        shape: The shape of the value or parameter; None if not known.
        dtype: The dtype of the value or parameter; None if not known.
        acts: The actions at the site, in the order in which they run.
        calls: For a recurrent cell whose calls are the steps of one sequence, the number of calls;
            otherwise 1.
        graph: For a torch.compile backend, the index of the captured graph that has the site;
            otherwise None.
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
class KeptRow:
    """A kept value in a report.

    Attributes:
        name: Its key in ``Kept.values``.
        site: Its site's name; for the calls of a recurrent cell, that of the first call and the number of calls.
        op: The operation that computes it.
        shape: Its shape as text; ``""`` if not known.
        dtype: Its dtype; ``""`` if not known.
        form: ``"spliced"`` or ``"clean"``.
        matched: The string of the selector that matched it.
    """

    name: str
    site: str
    op: str
    shape: str
    dtype: str
    form: str
    matched: str


@dataclass(frozen=True)
class NativeDropoutRow:
    """A native dropout in a report.

    Attributes:
        site: Its site's name.
        op: The name of the function that it calls, or of the class of the module that it calls.
        rate: Its rate when the model was traced; None if not known.
        acts: ``"mode"`` if it acts only while its module is in train mode; else ``"always"`` or
            ``"never"``.
        becomes: ``"off"``, ``"seeded"`` or ``"seeded at 0.1"`` if ``own_dropout=`` selected it; a
            rate with a schedule is followed by the current rate. ``"kept"`` if it still draws from
            torch's generator.
        matched: The selector of ``own_dropout=`` that matched it; empty if no selector did.
        why_not: Why it cannot be moved to graphreg's streams; empty if it can be moved.
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
        operations: The number of added operations, by regularizer. Operations that serve no single
            regularizer are counted by kind, such as ``"keys"`` or ``"copies"``. A matrix product or
            convolution counts its multiplications and additions. Any other operation counts one for
            each element of its largest tensor.
        kept: Additional bytes that autograd saves for backward, by the same names. A number is
            negative if autograd saves fewer bytes than without additions.
        model_operations: The operations of the model without additions.
        model_kept: The bytes that autograd saves for backward in the model without additions.
    """

    operations: Mapping[str, int]
    kept: Mapping[str, int]
    model_operations: int
    model_kept: int


UNKNOWN = "unknown"
_SHOWN = 4  # at most so many names are listed in one line
_PREFIXES = ("", "k", "M", "G", "T", "P")


@dataclass(frozen=True, repr=False)
class Report(Printed):
    """The result of ``graphreg.report``: where each regularizer acts, which parameters its penalty trains, and what it costs.

    ``str(report)`` is as wide as the terminal or the environment variable COLUMNS says; without
    either, nothing is wrapped. ``text(width)`` has no colours. ``to_dict()`` returns all
    attributes.

    Attributes:
        title: The name of the model's class.
        made: How the graph was made, such as ``"traced by the symbolic front end"``.
        regularizers: The regularizers, in the order of the plan.
        sites: The sites where a regularizer acts: values in the order of the graph, then
            parameters.
        own_dropout: The native dropouts.
        graphs: For a torch.compile backend, the captured graphs: index, code and modes of each.
        parameters: The number of parameter tensors of the model.
        cost: The cost of the additions; None if not known.
        no_cost: Why the cost is not known.
        missed: A dict. Each key is the name of a regularizer; the value has the strings of its
            selector that match nothing.
        notes: Remarks, one a line.
        kept: The values that a call returns beside output and penalties.
    """

    _gap: ClassVar[str] = "\n\n"
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
    kept: tuple[KeptRow, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain values that ``json`` can write."""
        return asdict(self)

    def to_json(self, indent: int | None = 2) -> str:
        """Return the report as JSON; ``indent`` is that of ``json.dumps``."""
        return json.dumps(self.to_dict(), indent=indent)

    def _blocks(self) -> Iterator[Paragraph]:
        yield Lines((self._heading(),), "bold")
        yield Table(("graph", "code", "modes"), self.graphs)
        yield _regularizers(self.regularizers)
        yield Lines(tuple(line for entry in self.regularizers if (line := self._notes_of(entry))))
        yield Table(("graph", "site", "op", "shape", "dtype", "what acts, in order", "matched by"), tuple(_rows(self.sites)))
        yield from _native_dropout(self.own_dropout)
        yield Table(HEADINGS, tuple(astuple(row) for row in self.kept))
        yield from _cost(self.cost, self.no_cost, bool(self.regularizers or self.own_dropout))

        missed = [f"matches nothing: {text!r} of {name}" for name, texts in self.missed.items() for text in texts]
        cure = "with example_inputs= shapes, dtypes, share and cost are shown"
        unknown = (
            []
            if all(site.shape is not None for site in self.sites)
            else [f"{UNKNOWN}: the model was traced without example inputs; {cure}"]
        )
        yield Lines((*missed, *unknown, *self.notes))

    def _heading(self) -> str:
        what = []
        if self.regularizers:
            places = [_counted(len({site.name for site in self.sites if site.kind == kind}), kind) for kind in ("value", "parameter")]
            at = " and ".join(text for text in places if not text.startswith("0 ")) or "no site"
            what.append(f"{_counted(len(self.regularizers), 'regularizer')} at {at}")
        if replaced := [row for row in self.own_dropout if row.becomes != KEPT]:
            what.append(f"{_counted(len(replaced), 'native dropout')} replaced")
        what += [f"{_counted(len(self.kept), 'value')} kept"] if self.kept else []
        return f"{self.title}, {self.made}: {'; '.join(what) or 'nothing acts'}"

    def _notes_of(self, entry: Entry) -> str:
        """Return a regularizer's line below the table: the parameters that it trains, and its notes; empty if it has neither."""
        notes = list(entry.notes)
        if entry.trains is not None:
            of = f"{len(entry.trains)} of {self.parameters} parameters"
            named = f"{', '.join(entry.trains)} ({of})" if 0 < len(entry.trains) <= _SHOWN else of
            more = f" and {len(entry.frozen) - _SHOWN} more" if len(entry.frozen) > _SHOWN else ""
            frozen = f"; frozen: {', '.join(entry.frozen[:_SHOWN])}{more}" if entry.frozen else ""
            notes.insert(0, f"trains {named if entry.trains else 'nothing'}{frozen}")
        return f"{entry.name}: {'; '.join(notes)}" if notes else ""


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


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
    """Yield a row for each regularizer at each site. The columns about the site are filled only in the first row of the site."""
    strengths = {(act.regularizer, act.strength) for site in sites for act in site.acts}
    # A strength that is the same at all sites is in the table of regularizers already.
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


def _native_dropout(rows: Sequence[NativeDropoutRow]) -> Iterator[Paragraph]:
    if not rows:
        return
    cells = [(r.site, r.op, "" if r.rate is None else f"{r.rate:g}", r.acts, r.becomes, r.matched) for r in rows]
    yield Table(("native dropout", "op", "rate", "acts", "becomes", "matched by"), tuple(cells))
    lines = [f"not movable: {r.site}: {r.why_not}" for r in rows if r.why_not]
    unmoved = [r for r in rows if r.becomes == KEPT]
    if unmoved:
        move = "; own_dropout='seeded' lets graphreg draw them where possible" if any(not r.why_not for r in unmoved) else ""
        lines.insert(0, f"{KEPT}: torch draws the masks, so graphreg's set_rng_state, frozen_noise and noise_on do not affect them{move}")
    yield Lines(tuple(lines))


def _cost(cost: Cost | None, why_not: str, acts: bool) -> Iterator[Paragraph]:
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


def percent(share: float) -> str:
    """Format a share in percent: without decimals if it is 10 % or more, else with two significant digits."""
    return f"{share:.0%}".replace("%", " %") if abs(share) >= 0.1 else f"{100 * share:.2g} %"


def amount(number: float, unit: str = "") -> str:
    """Format a number with three significant digits and an SI prefix: ``12.3 M``."""
    power = 0
    # 999.5 would be rounded to 1000, which has four digits.
    while abs(number) >= 999.5 and power < len(_PREFIXES) - 1:
        number, power = number / 1000, power + 1
    return f"{number:.3g} {_PREFIXES[power]}{unit}".rstrip()
