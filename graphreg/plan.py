"""The plan: every edit, decided before anything changes. Pure; prints as a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from graphreg.errors import GraphRegError, NoMatchError, RegularizerError
from graphreg.keywords import instances
from graphreg.regularizer import Penalty, Regularizer, Splice
from graphreg.selector import Missing, select
from graphreg.sites import Site, columns, dtype_text, shape_text
from graphreg.trace import Traced


@dataclass(frozen=True)
class Edit:
    """One regularizer at one site, and the string that chose it. ``occurrence`` counts its class at the site."""

    site: Site
    name: str
    regularizer: Regularizer
    matched: str
    occurrence: int = 0


@dataclass(frozen=True)
class Plan:
    """All edits of all regularizers; ``regularizers`` maps their final names to them, in order."""

    title: str
    regularizers: Mapping[str, Regularizer]
    edits: tuple[Edit, ...]

    def of(self, name: str) -> tuple[Edit, ...]:
        return tuple(edit for edit in self.edits if edit.name == name)

    @cached_property
    def by_site(self) -> dict[str, list[Edit]]:
        """The edits at each site, in order."""
        found: dict[str, list[Edit]] = {}
        for edit in self.edits:
            found.setdefault(edit.site.name, []).append(edit)
        return found

    def splices(self, site: str) -> tuple[Edit, ...]:
        return tuple(edit for edit in self.by_site[site] if isinstance(edit.regularizer, Splice))

    def measures_spliced(self, site: str) -> bool:
        """Whether a penalty reads what a splice has made of the value, and saves it for backward."""
        after = any(isinstance(edit.regularizer, Penalty) and not edit.regularizer.clean for edit in self.by_site[site])
        return after and bool(self.splices(site))

    def __str__(self) -> str:
        rows = [
            (
                e.site.name,
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
        return f"{self.title}: {len(self.edits)} edits by {count} regularizer{'s' * (count != 1)}\n{columns(head, rows)}"


def plan(traced: Traced, regularizers: Regularizer | Iterable[Regularizer], missing: Missing = "error") -> Plan:
    """Decide every edit. ``missing``: what a string that selects nothing is, ``"error"``, ``"warn"`` or ``"ignore"``.

    Raises NoMatchError for such a string and for a count other than ``expect``; RegularizerError for what is no
    regularizer, or a penalty that no trainable parameter reaches.
    """
    if not isinstance(traced, Traced):
        raise RegularizerError(f"plan takes what graphreg.trace(model) gives, not {type(traced).__name__}.")
    check_missing(missing)
    named = named_once(instances(regularizers))
    edits: list[Edit] = []
    seen: Counter[tuple[str, type]] = Counter()
    for name, regularizer in named.items():
        for site, text in _select(traced, regularizer, missing).items():
            kind = type(regularizer)
            edits.append(Edit(site, name, regularizer, text, seen[site.name, kind]))
            seen[site.name, kind] += 1
    return Plan(traced.title, named, tuple(edits))


def check_missing(missing: str) -> None:
    """Refuse an unknown ``missing``."""
    if missing not in ("error", "warn", "ignore"):
        raise RegularizerError(f"missing={missing!r} is unknown; it is 'error', 'warn' or 'ignore'.")


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


def _select(traced: Traced, regularizer: Regularizer, missing: Missing) -> dict[Site, str]:
    on_parameters = regularizer.on == "parameters"
    sites = [_enough_dims(s, regularizer.min_dims) for s in traced.parameters] if on_parameters else list(traced.values)
    if isinstance(regularizer, Splice):  # a splice at a value that nobody reads would do nothing, in silence
        sites = [s if s.used else replace(s, selectable=False, why_not=s.why_not or "its value is not used") for s in sites]
    usable = [site for site in sites if site.selectable]
    what = f"parameter of {regularizer.min_dims} dims or more" if on_parameters else "value"
    found = select(
        regularizer.pattern, sites, regularizer.defaults(usable), what=what, model=traced.title, missing=missing,
        who=type(regularizer).__name__, usual=regularizer.usual,
        elsewhere=traced.values if on_parameters else traced.parameters,
    )  # fmt: skip
    if regularizer.expect is not None and len(found) != regularizer.expect:
        listed = ", ".join(site.name for site in list(found)[:6]) or "none"
        raise NoMatchError(
            f"{type(regularizer).__name__}({regularizer.pattern!r}): expect={regularizer.expect}, found {len(found)} sites ({listed}). "
            "Mend the selector, or the number."
        )
    if isinstance(regularizer, Penalty) and on_parameters:
        _check_trainable(traced, regularizer, list(found))
    return found


def _enough_dims(site: Site, dims: int) -> Site:
    if not site.selectable or (site.shape is not None and len(site.shape) >= dims):
        return site
    few = len(site.shape or ())
    return replace(site, selectable=False, why_not=f"{few} dim{'s' * (few != 1)}, {dims} needed")


def _check_trainable(traced: Traced, regularizer: Penalty, sites: Sequence[Site]) -> None:
    parameters = dict(traced.model.named_parameters())
    if sites and not any(parameters[site.name].requires_grad for site in sites):
        raise RegularizerError(
            f"{type(regularizer).__name__}({regularizer.pattern!r}) selects only parameters that are frozen "
            f"({', '.join(site.name for site in sites[:3])}): it would train nothing. Unfreeze one, or leave it out."
        )


def require_sites(plan: Plan, traced: Traced) -> None:
    """Refuse a plan made for another model."""
    known = {site.name for site in traced.sites}
    strange = [edit.site.name for edit in plan.edits if edit.site.name not in known]
    if strange:
        raise GraphRegError(f"the plan is for {plan.title} and names {strange[0]!r}, which {traced.title} does not have. Plan again.")
