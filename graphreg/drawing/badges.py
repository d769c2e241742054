"""Turns the nodes that graphreg added into badges of the nodes where they act, and takes them out of the graph that is drawn."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import networkx as nx

from graphreg.drawing.view import Viewed

DiffState = Literal["", "added", "removed", "changed"]
# what reads them reads what they read
PASSED = ("splice", "track", "clone", "copy", "parameter", "replaced", "attach", "attached")
_COUNTED = ("splice", "measure", "read")
_SIGNS: dict[DiffState, str] = {"": "", "added": "+ ", "removed": "− ", "changed": ""}


@dataclass(frozen=True)
class Badge:
    """What a drawing shows at a node where a regularizer acts.

    Attributes:
        regularizer: The regularizer's name; ``"keep"`` for a value that a call returns.
        label: What acts, without its strength: the regularizer's name, after the name of the
            parameter if it acts on one.
        strength: The present strength as text; ``""`` if the badge has none.
        site: The name of the site.
        counted: Whether it counts as an action at a site. A value that a derivative is taken with
            respect to does not.
        state: In a comparison, what the second drawing has that the first has not, or the other way
            round.
    """

    regularizer: str
    label: str
    strength: str
    site: str
    counted: bool = True
    state: DiffState = ""

    @property
    def text(self) -> str:
        return f"{_SIGNS[self.state]}{self.label} {self.strength}".rstrip()


class Layers:
    """Finds the node that shows a parameter: the first one that uses it."""

    def __init__(self, graph: nx.DiGraph[str]) -> None:
        self._first: dict[tuple[bool, str], tuple[int, str]] = {}
        for place, key in enumerate(graph):
            attributes: Mapping[str, Any] = graph.nodes[key]
            target, call = str(attributes.get("target", "")), attributes.get("call")
            if attributes.get("kind") == "addition" or call not in ("call_module", "get_attr"):
                continue
            # A parameter that the forward reads by itself is not drawn, unless it is a site: the
            # first node that uses it shows it.
            readers = [] if attributes["kind"] == "site" else [r for r in graph.successors(key) if graph.nodes[r]["kind"] != "addition"]
            shown = key if call == "call_module" or attributes["kind"] == "site" else next(iter(readers), "")
            if shown:
                self._first.setdefault((call == "get_attr", target), (place, shown))

    def of(self, parameter: str) -> str | None:
        """Return the key of the node, or None if there is none."""
        names = parameter.split(".")
        # The module that is called may be one around the parameter's own, such as an opaque module.
        layers = [(False, ".".join(names[:i])) for i in range(1, len(names))]
        found = [self._first[one] for one in (*layers, (True, parameter)) if one in self._first]
        return min(found)[1] if found else None


def badges(graph: nx.DiGraph[str], seen: Viewed, layers: Layers) -> dict[str, tuple[Badge, ...]]:
    """Return the badges of each node, by the node's key, in the order of the graph."""
    found: dict[str, dict[Badge, None]] = {}
    for at, badge in _all(graph, seen, layers):
        found.setdefault(at, {})[badge] = None
    return {key: tuple(several) for key, several in found.items()}


def _all(graph: nx.DiGraph[str], seen: Viewed, layers: Layers) -> Iterator[tuple[str, Badge]]:
    # What is measured site by site has a node at each; of the rest, the plan knows the sites.
    measured = {a["regularizer"] for _, a in graph.nodes(data=True) if a.get("added") in ("measure", "read")}
    for key, a in graph.nodes(data=True):
        if "kept" in a:
            yield key, Badge("keep", "kept", "", key, counted=False)
        if a.get("kind") != "addition":
            continue
        name, site, strength = a["regularizer"], a["site"], f"{a['strength']:g}" if "strength" in a else ""
        if a["added"] in _COUNTED and (at := shower(graph, site, layers)) is not None:
            parameter = seen.sites[site].kind == "parameter" if site in seen.sites else False
            yield at, Badge(name, f"{site.rpartition('.')[2]}: {name}" if parameter else name, strength, site)
        elif a["added"] == "track" and (at := shower(graph, site, layers)) is not None:
            for one in name.split(", "):
                yield at, Badge(one, f"{one}: wrt", "", site, counted=False)
        elif a["added"] == "total" and name not in measured and seen.plan is not None:
            for edit in seen.plan.of(name):
                for one in edit.sites:
                    if (at := shower(graph, one.name, layers)) is not None:
                        yield at, Badge(name, name, strength, one.name)
    # What ``prox_`` does is in no graph.
    for edit in seen.plan.edits if seen.plan is not None else ():
        name, site = edit.name, edit.site.name
        if edit.regularizer.by_prox and (at := shower(graph, site, layers)) is not None:
            yield at, Badge(name, f"{site.rpartition('.')[2]}: {name}", f"{seen.strengths.get((name, site), seen.strengths[name]):g}", site)


def shower(graph: nx.DiGraph[str], site: str, layers: Layers) -> str | None:
    """Return the key of the node that shows a site, or None."""
    return site if site in graph and graph.nodes[site]["kind"] != "read" else layers.of(site)


def without_additions(graph: nx.DiGraph[str], shown: Mapping[str, tuple[Badge, ...]]) -> nx.DiGraph[str]:
    """Return the graph without the nodes that graphreg added, but for those that no badge shows."""
    places = {(badge.regularizer, badge.site) for several in shown.values() for badge in several}
    drawn: nx.DiGraph[str] = graph.copy()
    for key in reversed(list(graph)):
        attributes: Mapping[str, Any] = drawn.nodes[key]
        if attributes.get("kind") != "addition":
            continue
        if attributes["added"] in ("splice", "measure", "read") and (attributes["regularizer"], attributes["site"]) not in places:
            continue
        if attributes["added"] in PASSED:
            bypass(drawn, key)
        else:
            drawn.remove_node(key)
    return drawn


def bypass(graph: nx.DiGraph[str], key: str) -> None:
    """Remove a node and connect the nodes before it with those after it."""
    for before, _, edge in list(graph.in_edges(key, data=True)):
        for after in list(graph.successors(key)):
            if not graph.has_edge(before, after):
                graph.add_edge(before, after, **edge)
    graph.remove_node(key)
