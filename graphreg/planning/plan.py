"""The plan: every edit, decided before anything changes. Pure; prints as a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from graphreg.errors import GraphRegError, RegularizerError, shown, warn
from graphreg.ir import Missing, Own, Site, Steps, columns, dtype_text, shape_text
from graphreg.planning.dependence import Cone, cone
from graphreg.planning.keywords import instances
from graphreg.planning.matching import Census, census, check_count, missed, selected
from graphreg.planning.native_dropout import OWN, OwnDropout, OwnEdit, decide, nameless, table
from graphreg.planning.repeats import Repeat, lines, repeats, warning
from graphreg.regularizer import Penalty, Regularizer, Splice, check_lengths, sequences
from graphreg.tracing import Traced


@dataclass(frozen=True)
class Edit:
    """One regularizer at one site, and the string that chose it. ``occurrence`` counts its class at the site.

    ``steps``: how a penalty on sequences reads the value; where the calls of a cell are the steps, the site is the first.
    """

    site: Site
    name: str
    regularizer: Regularizer
    matched: str
    occurrence: int = 0
    steps: Steps | None = None

    @property
    def sites(self) -> tuple[Site, ...]:
        """Where the edit acts: at its site, or at each call of a cell."""
        return self.steps.calls if self.steps and self.steps.calls else (self.site,)

    @property
    def place(self) -> str:
        """The site as tables show it."""
        return f"{self.site.name} ({len(self.sites)} calls)" if self.steps and self.steps.calls else self.site.name


@dataclass(frozen=True)
class Plan:
    """All edits of all regularizers; ``regularizers`` maps their final names to them, in order.

    ``cones``: by name, what the penalties on derivatives differentiate with respect to. ``own``: what becomes of the model's
    own dropout; ``stays``: what of it was chosen and cannot be moved. ``census``: all sites that there are. ``missed``: by name,
    the strings that select nothing (``missing="warn"`` or ``"ignore"``). ``repeats``: splices of one kind that act on one value again
    and again. ``traced``: what it is the plan of, for the report.
    """

    title: str
    regularizers: Mapping[str, Regularizer]
    edits: tuple[Edit, ...]
    cones: Mapping[str, Cone] = field(default_factory=dict)
    own: tuple[OwnEdit, ...] = ()
    stays: tuple[Own, ...] = ()
    census: Census = field(default_factory=Census)
    missed: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    repeats: tuple[Repeat, ...] = ()
    traced: Traced | None = field(default=None, repr=False, compare=False)

    def of(self, name: str) -> tuple[Edit, ...]:
        return tuple(edit for edit in self.edits if edit.name == name)

    @cached_property
    def by_site(self) -> dict[str, list[Edit]]:
        """The edits at each site, in order."""
        found: dict[str, list[Edit]] = {}
        for edit in self.edits:
            for site in edit.sites:
                found.setdefault(site.name, []).append(edit)
        return found

    @cached_property
    def tracked(self) -> dict[str, list[str]]:
        """The values that derivatives are taken with respect to, with the penalties that take them."""
        found: dict[str, list[str]] = {}
        for name, own in self.cones.items():
            for site in own.wrt:
                found.setdefault(site.name, []).append(name)
        return found

    def splices(self, site: str) -> tuple[Edit, ...]:
        return tuple(edit for edit in self.by_site.get(site, ()) if isinstance(edit.regularizer, Splice))

    def reads_replaced(self, site: str) -> bool:
        """Whether a penalty reads, and saves for backward, what a splice has made of the value; or differentiates by the value."""
        own = self.by_site.get(site, ())
        after = any(isinstance(edit.regularizer, Penalty) and not edit.regularizer.clean for edit in own)
        return (after and bool(self.splices(site))) or site in self.tracked

    def __str__(self) -> str:
        rows = [
            (
                e.place,
                e.site.op,
                shape_text(e.site),
                dtype_text(e.site),
                f"{type(e.regularizer).__name__} {e.name}",
                f"{e.regularizer.weight:g}",
                e.matched,
            )
            for e in self.edits
        ]
        head = ("site", "op", "shape", "dtype", "regularizer", "weight", "matched by")
        count = len(self.regularizers)
        own = "".join(f"\n{line}" for line in table(self.own, self.stays))
        notes = "".join(f"\n{name}: {own.note()}" for name, own in self.cones.items())
        rows_text = "" if not rows else f"\n{columns(head, rows)}"
        missed = "".join(f"\n{name}: {', '.join(map(repr, texts))} matches nothing" for name, texts in self.missed.items())
        edits = f"{len(self.edits)} edit{'s' * (len(self.edits) != 1)}"
        repeated = "".join(f"\n{line}" for line in self.repeated())
        return f"{self.title}: {edits} by {count} regularizer{'s' * (count != 1)}{rows_text}{notes}{repeated}{own}{missed}"

    def repeated(self, strengths: Mapping[str, float] | None = None) -> list[str]:
        """Where one value is regularized again and again, and what comes of it; ``strengths``: the present ones, if not the plan's."""
        return lines(self.repeats, self.regularizers, strengths or {name: r.weight for name, r in self.regularizers.items()})

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain data, fit for JSON: ``title``, ``regularizers``, ``edits``, ``derivatives``, ``own_dropout``, ``stays``,
        ``missed``, ``repeats``."""
        return {
            "title": self.title,
            "regularizers": {name: regularizer.to_dict() for name, regularizer in self.regularizers.items()},
            "edits": [{"regularizer": e.name, "matched": e.matched, "sites": [site.to_dict() for site in e.sites]} for e in self.edits],
            "derivatives": {name: cone.note() for name, cone in self.cones.items()},
            "own_dropout": [{"site": e.own.site.name, "becomes": e.becomes, "matched": e.matched} for e in self.own],
            "stays": [own.text for own in self.stays],
            "missed": {name: list(texts) for name, texts in self.missed.items()},
            "repeats": [list(repeat.sites) for repeat in self.repeats],
        }


def plan(
    traced: Traced, regularizers: Regularizer | Iterable[Regularizer], missing: Missing = "error", own_dropout: OwnDropout = "keep"
) -> Plan:
    """Decide every edit. ``missing``: what a string that selects nothing is, ``"error"``, ``"warn"`` or ``"ignore"``.

    ``own_dropout``: what becomes of the model's own, as in ``regularize``.

    Warns of splices of one kind that act on one value again and again. Raises NoMatchError for such a string and for a count other than
    ``expect``; RegularizerError for what is no regularizer, or a penalty that no trainable parameter reaches.
    """
    found = decided(traced, regularizers, missing, own_dropout)
    if told := warning(found.repeats, found.regularizers, traced.values):
        warn(told)
    return found


def decided(
    traced: Traced, regularizers: Regularizer | Iterable[Regularizer], missing: Missing = "error", own_dropout: OwnDropout = "keep"
) -> Plan:
    """``plan``, without its warning."""
    if not isinstance(traced, Traced):
        raise RegularizerError(f"plan takes what graphreg.trace(model) gives, not {type(traced).__name__}.")
    check_missing(missing)
    named = named_once(instances(regularizers))
    edits: list[Edit] = []
    seen: Counter[tuple[str, type]] = Counter()
    for name, regularizer in named.items():
        for site, (text, steps) in _select(traced, regularizer, missing).items():
            kind = type(regularizer)
            edits.append(Edit(site, name, regularizer, text, seen[site.name, kind], steps))
            seen[site.name, kind] += 1
    own, stays = decide(own_dropout, traced.own_dropout, traced.title, missing, traced.values)
    cones = _cones(traced, named, edits)
    again = repeats(traced, [(edit.site, edit.name, edit.regularizer) for edit in edits if isinstance(edit.regularizer, Splice)])
    lost = _missed(traced, named, own_dropout, missing)
    return Plan(traced.title, named, tuple(edits), cones, own, stays, census(traced), lost, again, traced)


def _cones(traced: Traced, named: Mapping[str, Regularizer], edits: Sequence[Edit]) -> dict[str, Cone]:
    found = {}
    for name, regularizer in named.items():
        sites = [edit.site for edit in edits if edit.name == name]
        if sites and "pull" in regularizer.takes:
            found[name] = cone(traced, regularizer.engine_options.wrt, sites, type(regularizer).__name__)
    return found


def _missed(traced: Traced, named: Mapping[str, Regularizer], own_dropout: OwnDropout, missing: Missing) -> dict[str, tuple[str, ...]]:
    if missing == "error":  # such a string is one
        return {}
    found = {name: missed(traced, regularizer) for name, regularizer in named.items()}
    return {name: texts for name, texts in {**found, OWN: nameless(own_dropout, traced.own_dropout, traced.values)}.items() if texts}


def check_missing(missing: str) -> None:
    """Refuse an unknown ``missing``."""
    if missing not in ("error", "warn", "ignore"):
        raise RegularizerError(f"missing={shown(missing)} is unknown; it is 'error', 'warn' or 'ignore'.")


def named_once(regularizers: Sequence[Regularizer]) -> dict[str, Regularizer]:
    """Each regularizer's name: its own, else its first key; ``_1``, ``_2`` on repeats."""
    named: dict[str, Regularizer] = {}
    wanted = [r.name or (r.keys[0] if r.keys else type(r).__name__.lower()) for r in regularizers]
    for base, regularizer in zip(wanted, regularizers, strict=True):
        name, count = base, 0
        while name in named or (count and name in wanted):
            count += 1
            name = f"{base}_{count}"
        named[name] = regularizer
    return named


def _select(traced: Traced, regularizer: Regularizer, missing: Missing) -> dict[Site, tuple[str, Steps | None]]:
    chosen = _sequences(traced, regularizer, selected(traced, regularizer, missing))
    check_count(regularizer, list(chosen))
    if isinstance(regularizer, Penalty) and regularizer.on == "parameters":
        check_trainable(traced, regularizer, list(chosen))
    return chosen


def _sequences(traced: Traced, regularizer: Regularizer, found: Mapping[Site, str]) -> dict[Site, tuple[str, Steps | None]]:
    """The selected sites, and how a penalty that asks for steps reads them."""
    if "steps" not in regularizer.takes:
        return {site: (text, None) for site, text in found.items()}
    chosen = sequences(found, regularizer, traced.values, traced.operations, traced.graphs)
    if (lengths := regularizer.engine_options.lengths) is not None:
        nodes = {str(n.target): n for graph in traced.graphs.values() for n in graph.nodes if n.op == "placeholder"}
        inputs = {name: node.meta.get("value") for name, node in nodes.items() if name not in traced.held}
        check_lengths(chosen, lengths, inputs, traced.held, type(regularizer).__name__)
    return dict(chosen)


def check_trainable(traced: Traced, regularizer: Penalty, sites: Sequence[Site]) -> None:
    """Refuse a penalty on frozen parameters alone."""
    parameters = dict(traced.model.named_parameters())
    if sites and not any(parameters[site.name].requires_grad for site in sites):
        raise RegularizerError(
            f"{type(regularizer).__name__}({regularizer.pattern!r}) selects only parameters that are frozen "
            f"({', '.join(site.name for site in sites[:3])}): it would train nothing. Unfreeze one, or leave it out."
        )


def require_sites(plan: Plan, traced: Traced) -> None:
    """Refuse a plan made for another model."""
    known = {site.name for site in traced.sites}
    strange = [site.name for edit in plan.edits for site in edit.sites if site.name not in known]
    own = {own.site.name for own in traced.own_dropout} if plan.own else set()
    strange += [edit.own.site.name for edit in plan.own if edit.own.site.name not in own]
    if strange:
        raise GraphRegError(f"the plan is for {plan.title} and names {strange[0]!r}, which {traced.title} does not have. Plan again.")
