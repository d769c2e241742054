"""Chooses what of a graph is drawn, and groups it into boxes (modules within modules) with the lines at each level.

No line crosses the border of a box: a line ends at the border (``IN`` or ``OUT``), and another line continues on the other side. So each
module is laid out by itself, and folding a module changes nothing inside another.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

import networkx as nx

from graphreg.drawing.graph import as_networkx
from graphreg.drawing.view import Viewed
from graphreg.runtime import strength_text

IN, OUT = "<", ">"
ROOM = 60  # by default, whole depths of modules are unfolded as long as no more nodes than this are visible
WIDE = 6.2  # width of a letter, in pixels, at a font size of 10


@dataclass(frozen=True)
class Link:
    """A line between two children of a box, or between a child and the box's border.

    Attributes:
        start: The key of the child where the line starts, or ``IN``.
        end: The key of the child where the line ends, or ``OUT``.
        regularizer: The regularizer whose colour the line has; ``""`` for none.
        back: Whether the line runs upwards, because its end is placed before its start.
    """

    start: str
    end: str
    regularizer: str = ""
    back: bool = False


@dataclass
class Box:
    """A module that is drawn as a box; its key is its path and a slash.

    Attributes:
        path: The module's path.
        op: The name of the module's class.
        children: The keys of the nodes and boxes directly in the box, in the order of the graph.
        links: The lines between the children, and between children and the border.
        acts: For each regularizer, by name, the number of sites in the box, at any depth, at which it acts.
        nodes: The number of nodes in the box, at any depth.
    """

    path: str
    op: str
    children: list[str] = field(default_factory=list)
    links: list[Link] = field(default_factory=list)
    acts: Counter[str] = field(default_factory=Counter)
    nodes: int = 0

    @property
    def key(self) -> str:
        return f"{self.path}/"

    @property
    def depth(self) -> int:
        return self.path.count(".") + 1 if self.path else 0


@dataclass(frozen=True)
class Picture:
    """Everything that a drawing shows, before it is laid out.

    Attributes:
        title: The heading.
        nodes: The nodes that are drawn, by key, with the attributes of ``to_networkx``.
        boxes: The modules by key; the whole model comes first.
        edges: Each line, as the keys of its two nodes and the regularizer whose colour the line has.
        regularizers: What the legend says, by the regularizer's name.
    """

    title: str
    nodes: Mapping[str, Mapping[str, Any]]
    boxes: Mapping[str, Box]
    edges: tuple[tuple[str, str, str], ...]
    regularizers: Mapping[str, str]

    @cached_property
    def colour(self) -> dict[str, int]:
        """The number of each regularizer's colour."""
        return {name: i for i, name in enumerate(self.regularizers)}

    def around(self, key: str) -> tuple[str, ...]:
        """Return the keys of the boxes around a node, the outermost first."""
        return boxes_around(self.nodes[key]["box"])


def boxes_around(path: str) -> tuple[str, ...]:
    """Return the keys of the boxes from the whole model down to a path."""
    names = path.split(".") if path else []
    return tuple(f"{'.'.join(names[:i])}/" for i in range(len(names) + 1))


def picture(seen: Viewed) -> Picture:
    """Choose the nodes to draw (sites, operations with several results, additions of regularizers), and group them by module."""
    graph = as_networkx(seen)
    classes = dict(line.split("\t") for line in graph.graph["modules"].split("\n") if line)
    drawn = _drawn(graph)
    boxes = {"/": Box("", seen.title)}
    chains = {key: _chain(key, attributes["box"], boxes, classes) for key, attributes in drawn.nodes(data=True)}
    place = {child: i for i, child in enumerate(dict.fromkeys(key for chain in chains.values() for key in chain))}
    for key, attributes in drawn.nodes(data=True):
        for box in chains[key][:-1]:
            boxes[box].nodes += 1
            if attributes.get("added") in ("splice", "measure", "read"):
                boxes[box].acts[attributes["regularizer"]] += 1
    links: dict[str, dict[tuple[str, str], str]] = {key: {} for key in boxes}
    for start, end, edge in drawn.edges(data=True):
        for box, pair in _levels(chains[start], chains[end]):
            known = links[box].get(pair, edge["regularizer"])
            links[box][pair] = known if known == edge["regularizer"] else ""
    for key, pieces in links.items():
        for (start, end), name in pieces.items():
            back = start != IN and end != OUT and place[start] > place[end]
            boxes[key].links.append(Link(start, end, name, back))
    edges = tuple((start, end, edge["regularizer"]) for start, end, edge in drawn.edges(data=True))
    return Picture(seen.heading, {key: drawn.nodes[key] for key in drawn}, boxes, edges, _legend(seen))


def _legend(seen: Viewed) -> dict[str, str]:
    texts = {}
    for name, regularizer in seen.plan.regularizers.items() if seen.plan else ():
        count = len(seen.plan.of(name)) if seen.plan else 0
        sites = f"{count} site{'s' * (count != 1)}"
        texts[name] = f"{type(regularizer).__name__} {strength_text(name, seen.strengths)} on {regularizer.pattern!r}, {sites}"
    return texts


def _drawn(graph: nx.DiGraph[str]) -> nx.DiGraph[str]:
    """Return the graph without the nodes that are not drawn: sizes, noise keys, the clock, unread inputs, totals of measurements."""
    drawn: nx.DiGraph[str] = graph.copy()
    nodes = drawn.nodes
    measured = {a["regularizer"] for _, a in graph.nodes(data=True) if a.get("added") in ("measure", "read")}
    for key in reversed(list(graph)):
        attributes = nodes[key]
        added, why_not, readers = attributes.get("added"), attributes.get("why_not"), list(drawn.successors(key))
        if added in ("attach", "attached") or (why_not == "a tuple" and readers and attributes["op"] == "getitem"):
            _bypass(drawn, key)
        elif attributes["kind"] == "other" and readers and all(nodes[reader]["kind"] == "output" for reader in readers):
            _bypass(drawn, key)  # the node makes the object that the model returns
        elif (
            added in ("key", "clock") or (added == "total" and attributes["regularizer"] in measured)
            or why_not == "no tensor" or attributes["kind"] in ("other", "read")
            or (not readers and (why_not == "a tuple" or attributes["call"] == "placeholder"))
        ):  # fmt: skip
            drawn.remove_node(key)
    for key in list(drawn):
        attributes = nodes[key]
        if attributes.get("added") == "total":  # remove its line to the output: penalties measured by site have no such line either
            drawn.remove_edges_from([(key, end) for end in list(drawn.successors(key)) if nodes[end]["kind"] == "output"])
        if attributes.get("added") == "read" and (layer := layer_of(nodes, attributes["site"])) is not None:
            drawn.add_edge(layer, key, regularizer=attributes["regularizer"])
    return drawn


def layer_of(nodes: Mapping[str, Mapping[str, Any]], parameter: str) -> str | None:
    """Return the key of the first node that uses a parameter: a call of the layer that has it, or a ``get_attr`` of the model."""
    for key, attributes in nodes.items():
        runs = attributes["call"] == "call_module" and attributes["kind"] != "addition" and parameter.startswith(f"{attributes['target']}.")
        if runs or (attributes["call"] == "get_attr" and attributes["kind"] == "site" and attributes["target"] == parameter):
            return key
    return None


def _bypass(graph: nx.DiGraph[str], key: str) -> None:
    """Remove a node and connect the nodes before it with those after it."""
    for before, _, edge in list(graph.in_edges(key, data=True)):
        for after in list(graph.successors(key)):
            if not graph.has_edge(before, after):
                graph.add_edge(before, after, **edge)
    graph.remove_node(key)


def _chain(key: str, path: str, boxes: dict[str, Box], classes: Mapping[str, str]) -> tuple[str, ...]:
    """Return the keys of the boxes around a node, from the outermost, and the node's key. Make each a child of the box before it."""
    chain = (*boxes_around(path), key)
    for outer, inner in pairwise(chain):
        if inner != key and inner not in boxes:
            boxes[inner] = Box(inner[:-1], classes.get(inner[:-1], ""))
        if inner == key or inner not in boxes[outer].children:
            boxes[outer].children.append(inner)
    return chain


def _levels(start: tuple[str, ...], end: tuple[str, ...]) -> list[tuple[str, tuple[str, str]]]:
    """Split a line between two nodes into pieces that each lie within one box. Return the box's key and the two ends of each piece."""
    shared = 0
    while start[shared + 1] == end[shared + 1]:  # this ends at the last keys at the latest, because they differ
        shared += 1
    pieces = [(start[shared], (start[shared + 1], end[shared + 1]))]
    pieces += [(box, (child, OUT)) for box, child in zip(start[shared + 1 : -1], start[shared + 2 :], strict=True)]
    pieces += [(box, (IN, child)) for box, child in zip(end[shared + 1 : -1], end[shared + 2 :], strict=True)]
    return pieces


def unfolded(shown: Picture, level: int | None = None) -> frozenset[str]:
    """Return the keys of the boxes to unfold: those above the depth ``level``; with None, as many whole depths as ``ROOM`` allows."""
    if level is not None:
        return frozenset(key for key, box in shown.boxes.items() if box.depth < level)
    opened = frozenset(("/",))
    for depth in range(1, 1 + max(box.depth for box in shown.boxes.values())):
        more = opened | {key for key, box in shown.boxes.items() if box.depth <= depth}
        if sum(child not in more for key in more for child in shown.boxes[key].children) > ROOM:
            return opened
        opened = more
    return opened


def lines(shown: Picture, key: str) -> tuple[str, str]:
    """Return the two lines of text in a node or a folded module."""
    if key in shown.boxes:
        box = shown.boxes[key]
        return f"{box.path.rpartition('.')[2]} {box.op}".strip(), f"{box.nodes} inside"
    attributes = shown.nodes[key]
    if attributes["kind"] == "addition":
        strength = f" {attributes['strength']:g}" if "strength" in attributes else ""
        if attributes["added"] == "track":
            return attributes["regularizer"], f"wrt {attributes['site']}"
        what = attributes["site"].rpartition(".")[2] if attributes["added"] == "read" else attributes["op"]
        return attributes["regularizer"] or attributes["added"], f"{what}{strength}"
    full = attributes["target"] if attributes["call"] == "get_attr" else attributes["name"]  # a get_attr is shown by what it reads
    name = full.removeprefix(f"{attributes['box']}.") if attributes["box"] else full
    if attributes["target"] == "getitem" and attributes["op"] != "getitem" and ":" not in name:
        name += ":out"  # a module's first output; the call of the module is drawn too, by the bare name
    dropout = f"native: {attributes['own_dropout']}" if "own_dropout" in attributes else ""
    return name, " ".join(filter(None, [attributes["op"] if attributes["op"] != name else "", attributes.get("shape", ""), dropout]))


def text_width(text: str) -> float:
    """Return the width of a text in pixels, in a monospaced font of size 10; a wide East Asian character counts as two."""
    return WIDE * sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in text)
