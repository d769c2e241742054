"""Finds values that splices of one kind act on several times in a row, for example dropout before and after a view.

This is rarely intended. A plan and a report show the effect. ``plan`` also warns, and suggests a
selector that matches each value once. Native dropout that does the same to a value as a splice
counts, too; of that, the plan, the report and the log tell.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from graphreg.ir.provenance import one_value_over_again
from graphreg.ir.random_ops import NativeDropout
from graphreg.ir.selector import Pattern, exactly
from graphreg.ir.site import Site
from graphreg.planning.native_dropout import NativeDropoutEdit
from graphreg.regularizer.base import Regularizer, Splice
from graphreg.tracing.trace import Traced

_SHOWN = 3  # how many repeats a plan or a report shows
_NUMBER = re.compile(r"(?<![^._])\d+(?=\.)")  # the number of a layer in a path


# by regularizer name; strengths that differ by site also by (regularizer name, site name)
Strengths = Mapping[Any, float]


@dataclass(frozen=True)
class Repeat:
    """One value that several splices of one kind act on, one after another, or splices and native dropout.

    Attributes:
        sites: The names of the value's sites, in order. Only views, dropout, norms and
            multiplications lie between them.
        acts: For each splice, the names of its site and of its regularizer.
        native: The native dropouts, each with the rate that the plan gives it.
    """

    sites: tuple[str, ...]
    acts: tuple[tuple[str, str], ...]
    native: tuple[NativeDropout, ...] = ()

    def present(self, strengths: Strengths) -> Repeat:
        """Return the repeat without the splices whose strength is 0."""
        acts = tuple(act for act in self.acts if strength_at(act, strengths))
        there = {site for site, _ in acts} | {each.site.name for each in self.native}
        return Repeat(tuple(site for site in self.sites if site in there), acts, self.native)

    @property
    def is_of_splices(self) -> bool:
        """Whether splices act at two sites or more, so that another selector would change it."""
        return len({site for site, _ in self.acts}) > 1

    def rates(self, strengths: Strengths) -> tuple[tuple[float, ...], tuple[tuple[str, float | None], ...]]:
        """Return the strengths of the splices, and the operation and the rate of each native dropout."""
        now = self.present(strengths)
        return tuple(strength_at(act, strengths) for act in now.acts), tuple((each.site.op, each.rate) for each in now.native)

    def text(self, regularizers: Mapping[str, Regularizer], strengths: Strengths, more: str = "") -> str:
        """Describe the effect of the splices together; ``""`` if it is harmless. ``more``: text to append to the list of sites."""
        now = self.present(strengths)
        first = regularizers[self.acts[0][1]]
        if not (now.is_of_splices or (now.acts and now.native)) or not isinstance(first, Splice):
            return ""
        effect = first.in_a_row([*(strength_at(act, strengths) for act in now.acts), *(each.rate or 0.0 for each in now.native)])
        names = [*(name for _, name in now.acts), *(f"the model's own {each.site.op} {each.rate:g}" for each in now.native)]
        once = list(dict.fromkeys(names))
        how = f"{len(names)} times in a row" if len(once) < len(names) else "one after another"
        act = f"{' and '.join(once)} {'acts' if len(once) == 1 else 'act'} {how} on one value"
        return f"{act} ({', '.join(now.sites)}{more}): {effect}" if effect else ""


def strength_at(act: tuple[str, str], strengths: Strengths) -> float:
    """Return the strength of a splice. ``act``: the names of its site and of its regularizer."""
    site, name = act
    return strengths.get((name, site), strengths[name])


def repeats(
    traced: Traced, splices: Sequence[tuple[Site, str, Regularizer]], edits: Sequence[NativeDropoutEdit] = ()
) -> tuple[Repeat, ...]:  # fmt: skip
    """Find the values of the training graph that splices of one kind act on more than once, or beside native dropout that does the same.

    Args:
        traced: The traced model.
        splices: The site, the name and the regularizer of each splice.
        edits: What the plan does with native dropout.
    """
    graph, repeated = next(iter(traced.graphs.values()), None), list[Repeat]()
    rates = {edit.dropout.site.name: edit.rate for edit in edits if edit.rate is not None}
    for kind in dict.fromkeys(type(regularizer) for _, _, regularizer in splices):
        at: dict[str, list[str]] = {}
        for site, name, regularizer in splices:
            if type(regularizer) is kind:
                at.setdefault(site.name, []).append(name)
        # the dropouts that do the same as these splices, each with the rate at which the plan runs
        # it
        alike = [each for each in traced.native_dropout if issubclass(kind, Splice) and each.kind in kind.native_kinds]
        planned = [replace(each, rate=float(rates.get(each.site.name, each.rate or 0.0))) for each in alike]
        native = {each.site.name: each for each in planned if each.rate and each.when != "never"}
        among = at | native
        groups = one_value_over_again(graph, traced.operations, among) if graph is not None and len(among) > 1 else []
        grouped = {site for group in groups for site in group}
        # Without a group of several sites, there is still a splice at the output of a native
        # dropout.
        for way in (*groups, *((site,) for site in at if site in native and site not in grouped)):
            acts = tuple((site, name) for site in way for name in at.get(site, ()))
            # A group may consist of native dropout alone.
            if acts:
                repeated.append(Repeat(way, acts, tuple(native[site] for site in way if site in native)))
    return tuple(repeated)


def repeat_lines(repeated: Sequence[Repeat], regularizers: Mapping[str, Regularizer], strengths: Strengths) -> list[str]:
    """Return the lines that a plan and a report show.

    Of splices alone: one for each of the first three repeats, then the number of other repeats.
    Then those of ``lines_beside_native``.
    """
    texts = [text for repeat in repeated if not repeat.native and (text := repeat.text(regularizers, strengths))]
    more = [f"and so on at {len(texts) - _SHOWN} more places"] if len(texts) > _SHOWN else []
    return [*texts[:_SHOWN], *more, *lines_beside_native(repeated, regularizers, strengths)]


def lines_beside_native(repeated: Sequence[Repeat], regularizers: Mapping[str, Regularizer], strengths: Strengths) -> list[str]:
    """Return a line on splices that act beside native dropout, for each regularizer or set of regularizers that does."""
    alike: dict[tuple[str, ...], list[Repeat]] = {}
    for repeat in repeated:
        if repeat.native and repeat.text(regularizers, strengths):
            alike.setdefault(tuple(dict.fromkeys(name for _, name in repeat.acts)), []).append(repeat)
    texts = list[str]()
    for several in alike.values():
        off = {_NUMBER.sub("*", exactly(each.site.labels[0])): "off" for one in several for each in one.native if not each.why_not}
        cure = f". own_dropout={off!r} turns the model's own off" if off else ""
        more = _and_so_on(len(several) - 1)
        if any(each.rates(strengths) != several[0].rates(strengths) for each in several):
            more += " with other rates"  # the line has the rates and the effect of the first
        texts.append(several[0].text(regularizers, strengths, more) + cure)
    return texts


def _and_so_on(others: int) -> str:
    return f", and so on at {others} more place{'s' * (others > 1)}" if others else ""


def warning(repeated: Sequence[Repeat], regularizers: Mapping[str, Regularizer], sites: Sequence[Site], strengths: Strengths) -> str:
    """Return one warning for all repeats, with a selector that matches each value once; ``""`` if all repeats are harmless."""
    notable = [repeat for repeat in repeated if repeat.is_of_splices and repeat.text(regularizers, strengths)]
    if not notable:
        return ""
    # The warning shows the first, so this is the value on which the most splices act.
    notable.sort(key=lambda repeat: -len(repeat.present(strengths).acts))
    more = f", which differ only by views, dropout, norms and scale{_and_so_on(len(notable) - 1)}"
    text = notable[0].text(regularizers, strengths, more)
    return f"{text}. To act once, select {_one_of_each(notable, sites)}."


def _one_of_each(repeated: Sequence[Repeat], sites: Sequence[Site]) -> str:
    """Return, as text, selectors that match one site of each value: a hidden site if the value has one, else its first site.

    The number of a layer becomes ``*`` if the selector then matches exactly the chosen sites.
    """
    known = {site.name: site for site in sites}
    alike: dict[str, set[str]] = {}
    for repeat in repeated:
        places = [known[name] for name in dict.fromkeys(site for site, _ in repeat.acts)]
        site = next((site for site in places if site.role == "hidden"), places[0])
        alike.setdefault(_NUMBER.sub("*", exactly(site.labels[0])), set()).add(exactly(site.labels[0]))
    texts = list[str]()
    for glob, chosen in alike.items():
        matched = {exactly(site.labels[0]) for site in Pattern.parse(glob).find([site for site in sites if site.selectable])}
        texts += [glob] if matched == chosen and len(chosen) > 1 else sorted(chosen)
    return repr(texts[0]) if len(texts) == 1 else repr(texts) if len(texts) <= _SHOWN else f"{texts[0]!r} at the first of these"
