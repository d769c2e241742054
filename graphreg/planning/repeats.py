"""Finds values that splices of one kind act on several times in a row, for example dropout before and after a view.

This is rarely intended. A plan and a report show the effect. ``plan`` also warns, and suggests a selector that matches each value once.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from graphreg.ir import Pattern, Site, exactly, one_value_over_again
from graphreg.regularizer import Regularizer, Splice
from graphreg.tracing import Traced

_SHOWN = 3  # how many repeats a plan or a report shows
_NUMBER = re.compile(r"(?<![^._])\d+(?=\.)")  # the number of a layer in a path


Strengths = Mapping[Any, float]  # by regularizer name; strengths that differ by site also by (regularizer name, site name)


@dataclass(frozen=True)
class Repeat:
    """One value that several splices of one kind act on, one after another.

    Attributes:
        sites: The names of the value's sites, in order. Only views, dropout, norms and multiplications lie between them.
        acts: For each splice, the names of its site and of its regularizer.
    """

    sites: tuple[str, ...]
    acts: tuple[tuple[str, str], ...]

    def present(self, strengths: Strengths) -> Repeat:
        """Return the repeat without the splices whose strength is 0."""
        acts = tuple(act for act in self.acts if _strength(act, strengths))
        return Repeat(tuple(dict.fromkeys(site for site, _ in acts)), acts)

    def text(self, regularizers: Mapping[str, Regularizer], strengths: Strengths, more: str = "") -> str:
        """Describe the effect of the splices together; ``""`` if it is harmless. ``more``: text to append to the list of sites."""
        now = self.present(strengths)
        first = regularizers[self.acts[0][1]]
        if len(now.sites) < 2 or not isinstance(first, Splice):
            return ""
        effect = first.in_a_row([_strength(act, strengths) for act in now.acts])
        names = list(dict.fromkeys(name for _, name in now.acts))
        act = f"{' and '.join(names)} {'acts' if len(names) == 1 else 'act'} {len(now.acts)} times in a row on one value"
        return f"{act} ({', '.join(now.sites)}{more}): {effect}" if effect else ""


def _strength(act: tuple[str, str], strengths: Strengths) -> float:
    site, name = act
    return strengths.get((name, site), strengths[name])


def repeats(traced: Traced, splices: Sequence[tuple[Site, str, Regularizer]]) -> tuple[Repeat, ...]:
    """Find the values of the training graph that splices of one kind act on more than once.

    ``splices``: the site, the name and the regularizer of each splice.
    """
    graph, repeated = next(iter(traced.graphs.values()), None), list[Repeat]()
    for kind in dict.fromkeys(type(regularizer) for _, _, regularizer in splices):
        at: dict[str, list[str]] = {}
        for site, name, regularizer in splices:
            if type(regularizer) is kind:
                at.setdefault(site.name, []).append(name)
        for way in one_value_over_again(graph, traced.operations, at) if graph is not None and len(at) > 1 else ():
            repeated.append(Repeat(way, tuple((site, name) for site in way for name in at[site])))
    return tuple(repeated)


def lines(repeated: Sequence[Repeat], regularizers: Mapping[str, Regularizer], strengths: Strengths) -> list[str]:
    """Return the lines that a plan and a report show: one for each of the first three repeats, then the number of other repeats."""
    texts = [text for repeat in repeated if (text := repeat.text(regularizers, strengths))]
    more = [f"and so on at {len(texts) - _SHOWN} more places"] if len(texts) > _SHOWN else []
    return [*texts[:_SHOWN], *more]


def warning(repeated: Sequence[Repeat], regularizers: Mapping[str, Regularizer], sites: Sequence[Site], strengths: Strengths) -> str:
    """Return one warning for all repeats, with a selector that matches each value once; ``""`` if all repeats are harmless."""
    notable = [repeat for repeat in repeated if repeat.text(regularizers, strengths)]
    if not notable:
        return ""
    notable.sort(key=lambda repeat: -len(repeat.present(strengths).acts))
    others = f", and so on at {len(notable) - 1} more place{'s' * (len(notable) > 2)}" if len(notable) > 1 else ""
    text = notable[0].text(regularizers, strengths, f", which differ only by views, dropout, norms and scale{others}")
    return f"{text}. To act once, select {_one_of_each(notable, sites)}."


def _one_of_each(repeated: Sequence[Repeat], sites: Sequence[Site]) -> str:
    """Return, as text, selectors that match one site of each value: a hidden site if the value has one, else its first site.

    The number of a layer becomes ``*`` if the selector then matches exactly the chosen sites.
    """
    known = {site.name: site for site in sites}
    alike: dict[str, set[str]] = {}
    for repeat in repeated:
        places = [known[name] for name in repeat.sites]
        site = next((site for site in places if site.role == "hidden"), places[0])
        alike.setdefault(_NUMBER.sub("*", exactly(site.labels[0])), set()).add(exactly(site.labels[0]))
    texts = list[str]()
    for glob, chosen in alike.items():
        matched = {exactly(site.labels[0]) for site in Pattern.parse(glob).find([site for site in sites if site.selectable])}
        texts += [glob] if matched == chosen and len(chosen) > 1 else sorted(chosen)
    return repr(texts[0]) if len(texts) == 1 else repr(texts) if len(texts) <= _SHOWN else f"{texts[0]!r} at the first of these"
