"""Repeats: splices of one kind that act on one value again and again, which is rarely meant; what comes of it, and what to select."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from graphreg.ir import Pattern, Site, exactly, one_value_over_again
from graphreg.regularizer import Regularizer, Splice
from graphreg.tracing import Traced

_SHOWN = 3  # places in a plan and a report
_NUMBER = re.compile(r"(?<![^._])\d+(?=\.)")  # of a layer, in a path


@dataclass(frozen=True)
class Repeat:
    """A value that several splices of one kind act on, one after another. ``sites``: its places; ``acts``: site and regularizer."""

    sites: tuple[str, ...]
    acts: tuple[tuple[str, str], ...]

    def present(self, strengths: Mapping[str, float]) -> Repeat:
        """Without those whose strength is 0 now."""
        acts = tuple(act for act in self.acts if strengths[act[1]])
        return Repeat(tuple(dict.fromkeys(site for site, _ in acts)), acts)

    def text(self, regularizers: Mapping[str, Regularizer], strengths: Mapping[str, float], more: str = "") -> str:
        """What comes of it, in the words of the regularizer; nothing where that is as one would think. ``more``: of the places."""
        now = self.present(strengths)
        first = regularizers[self.acts[0][1]]
        if len(now.sites) < 2 or not isinstance(first, Splice):
            return ""
        comes_of_it, names = first.in_a_row([strengths[name] for _, name in now.acts]), list(dict.fromkeys(name for _, name in now.acts))
        act = f"{' and '.join(names)} {'acts' if len(names) == 1 else 'act'} {len(now.acts)} times in a row on one value"
        return f"{act} ({', '.join(now.sites)}{more}): {comes_of_it}" if comes_of_it else ""


def repeats(traced: Traced, splices: Sequence[tuple[Site, str, Regularizer]]) -> tuple[Repeat, ...]:
    """Of the splices, each with its site and its name, those of one kind that act on a value more than once in the training graph."""
    graph, found = next(iter(traced.graphs.values()), None), []
    for kind in dict.fromkeys(type(regularizer) for _, _, regularizer in splices):
        at: dict[str, list[str]] = {}
        for site, name, regularizer in splices:
            if type(regularizer) is kind:
                at.setdefault(site.name, []).append(name)
        for way in one_value_over_again(graph, traced.operations, at) if graph is not None and len(at) > 1 else ():
            found.append(Repeat(way, tuple((site, name) for site in way for name in at[site])))
    return tuple(found)


def lines(found: Sequence[Repeat], regularizers: Mapping[str, Regularizer], strengths: Mapping[str, float]) -> list[str]:
    """Those that a plan and a report show."""
    texts = [text for repeat in found if (text := repeat.text(regularizers, strengths))]
    more = [f"and so on at {len(texts) - _SHOWN} more places"] if len(texts) > _SHOWN else []
    return [*texts[:_SHOWN], *more]


def warning(found: Sequence[Repeat], regularizers: Mapping[str, Regularizer], sites: Sequence[Site]) -> str:
    """One sentence for all of them, with the selector that means one place of each; nothing where nothing is to be said."""
    strengths = {name: regularizer.weight for name, regularizer in regularizers.items()}
    told = [repeat for repeat in found if repeat.text(regularizers, strengths)]
    if not told:
        return ""
    told.sort(key=lambda repeat: -len(repeat.present(strengths).acts))
    others = f", and so on at {len(told) - 1} more place{'s' * (len(told) > 2)}" if len(told) > 1 else ""
    text = told[0].text(regularizers, strengths, f", the same but for views, dropout, norms and scale{others}")
    return f"{text}. To act once, select {_one_of_each(told, sites)}."


def _one_of_each(told: Sequence[Repeat], sites: Sequence[Site]) -> str:
    """One place of each, the hidden one or else the first; the number of a layer as ``*`` where that means the same place of each."""
    known = {site.name: site for site in sites}
    alike: dict[str, set[str]] = {}
    for repeat in told:
        places = [known[name] for name in repeat.sites]
        site = next((site for site in places if site.role == "hidden"), places[0])
        alike.setdefault(_NUMBER.sub("*", exactly(site.labels[0])), set()).add(exactly(site.labels[0]))
    texts = list[str]()
    for glob, chosen in alike.items():
        found = {exactly(site.labels[0]) for site in Pattern.parse(glob).find([site for site in sites if site.selectable])}
        texts += [glob] if found == chosen and len(chosen) > 1 else sorted(chosen)
    return repr(texts[0]) if len(texts) == 1 else repr(texts) if len(texts) <= _SHOWN else f"{texts[0]!r} at the first of these"
