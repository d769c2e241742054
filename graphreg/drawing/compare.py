"""Compares what two plans or two rewritten modules do to one model: the badges, the heading and the legend of one drawing for both."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, replace

import networkx as nx

from graphreg.drawing.badges import Badge, Layers, badges
from graphreg.drawing.graph import as_networkx
from graphreg.drawing.view import Viewed
from graphreg.errors import GraphRegError, listed
from graphreg.planning.native_dropout import OWN_DROPOUT
from graphreg.regularizer.base import Regularizer
from graphreg.session.strengths import strength_text

Badges = Mapping[str, tuple[Badge, ...]]


def compared_badges(graph: nx.DiGraph[str], shown: Badges, other: Viewed) -> dict[str, tuple[Badge, ...]]:
    """Return the badges of both, each with what became of it in the other: added, removed, changed, or the same.

    Args:
        graph: The graph that is drawn.
        shown: Its badges.
        other: What it is compared with.

    Raises:
        GraphRegError: The two are not of the same model.
    """
    against = as_networkx(other)
    ours, theirs = ({key for key, a in one.nodes(data=True) if a.get("kind") != "addition"} for one in (graph, against))
    if ours != theirs:
        differing = [key for key in (*graph, *against) if key in ours ^ theirs]
        raise GraphRegError(
            f"against= is for another plan or module of the same model, and these differ in {listed(differing)}. Trace both with the same "
            "front end and example inputs."
        )
    before = badges(against, other, Layers(against))
    return {key: _merged(shown.get(key, ()), before.get(key, ())) for key in (*shown, *(key for key in before if key not in shown))}


def _merged(now: tuple[Badge, ...], before: tuple[Badge, ...]) -> tuple[Badge, ...]:
    """Return the badges of a node: those of now in their order, then those that are gone."""
    # Badges are the same if label and site are equal; their strengths may differ.
    old = {(badge.label, badge.site): badge for badge in before}
    made = []
    for badge in now:
        was = old.pop((badge.label, badge.site), None)
        if was is None:
            made.append(replace(badge, state="added"))
        elif was.strength != badge.strength:
            made.append(replace(badge, state="changed", strength=f"{was.strength} → {badge.strength}"))
        else:
            made.append(badge)
    return (*made, *(replace(badge, state="removed") for badge in old.values()))


def heading(seen: Viewed) -> str:
    """Return the heading of a drawing."""
    return seen.heading if seen.against is None else f"{seen.heading}, compared"


def legend(seen: Viewed) -> dict[str, str]:
    """Return what the legend says, by the regularizer's name."""
    other = seen.against
    if other is None:
        return _texts(seen, {})
    now, before = ({**_texts(a, b.plan.regularizers if b.plan else {}), **_native(a)} for a, b in ((seen, other), (other, seen)))
    return {
        name: now[name] if before.get(name) == now.get(name) else f"{before.get(name, 'none')} → {now.get(name, 'none')}"
        for name in (*now, *(name for name in before if name not in now))
        if name != OWN_DROPOUT or before.get(name) != now.get(name)
    }


def _texts(seen: Viewed, others: Mapping[str, Regularizer]) -> dict[str, str]:
    """Return a line for each regularizer. ``others``: regularizers by name; options that differ from theirs are named."""
    texts = {}
    for name, regularizer in seen.plan.regularizers.items() if seen.plan else ():
        count = len(seen.plan.of(name)) if seen.plan else 0
        sites = f"{count} site{'s' * (count != 1)}"
        options = "".join(f", {option}={value!r}" for option, value in _differing(regularizer, others.get(name)))
        texts[name] = f"{type(regularizer).__name__} {strength_text(name, seen.strengths)} on {regularizer.pattern!r}, {sites}{options}"
    return texts


def _differing(regularizer: Regularizer, other: Regularizer | None) -> Iterator[tuple[str, object]]:
    """Yield the options, apart from pattern and strength, in which a regularizer differs from another of its class."""
    for field in fields(regularizer) if type(other) is type(regularizer) else ():
        value = getattr(regularizer, field.name)
        if field.name not in ("pattern", "name", "weight") and repr(value) != repr(getattr(other, field.name)):
            yield field.name, value


def _native(seen: Viewed) -> dict[str, str]:
    """Return a line for native dropout, if the plan changes some."""
    changed = [f"{edit.action} at {edit.dropout.site.name}" for edit in seen.plan.native_dropout] if seen.plan else []
    return {OWN_DROPOUT: listed(changed)} if changed else {}
