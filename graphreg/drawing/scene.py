"""Chooses what of a graph is drawn, and groups it into boxes (modules within modules) with the lines at each level.

No line crosses the border of a box: a line ends at the border (``IN`` or ``OUT``), and another line
continues on the other side. So each module is laid out by itself, and folding a module changes
nothing inside another.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal

import networkx as nx

from graphreg.drawing.badges import Badge, Layers, badges, bypass, without_additions
from graphreg.drawing.compare import compared_badges, heading, legend
from graphreg.drawing.fold import CHAIN, SMALL, Folder, FoldKind, arithmetic
from graphreg.drawing.graph import as_networkx
from graphreg.drawing.view import Viewed

IN, OUT = "<", ">"
# by default, whole depths of modules are unfolded as long as no more nodes than this are visible
ROOM = 60
BoxPaths = dict[str, tuple[str, ...]]
WIDE = 6.2  # width of a letter, in pixels, at a font size of 10


@dataclass(frozen=True)
class BoxLink:
    """A line between two children of a box, or between a child and the box's border.

    Attributes:
        start: The key of the child where the line starts, or ``IN``.
        end: The key of the child where the line ends, or ``OUT``.
        back: Whether the line runs upwards, because its end is placed before its start.
    """

    start: str
    end: str
    back: bool = False


@dataclass
class Box:
    """A module that is drawn as a box, or a box of what is folded.

    Attributes:
        path: The module's path; for a fold, the path of the module that it is in.
        name: The module's path within the module of the box around it; ``""`` for the whole model
            and for a fold.
        op: The name of the module's class; for a fold, what it holds.
        children: The keys of the nodes and boxes directly in the box, in the order of the graph.
        links: The lines between the children, and between children and the border.
        acts: For each regularizer, by name, the number of sites in the box, at any depth, at which
            it acts.
        nodes: The number of nodes in the box, at any depth.
        key: Its key: for a module, its path and a slash.
        kind: ``"module"``, or the kind of the fold.
        repeats: For a module that holds nothing but equal modules: what they are, and how many.
        stubs: The keys of the values from outside that a child reads, where a stub with their names
            stands in place of a line.
    """

    path: str
    name: str
    op: str
    children: list[str] = field(default_factory=list)
    links: list[BoxLink] = field(default_factory=list)
    acts: Counter[str] = field(default_factory=Counter)
    nodes: int = 0
    key: str = ""
    kind: Literal["module"] | FoldKind = "module"
    repeats: str = ""
    stubs: dict[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def depth(self) -> int:
        """The depth of its module; the whole model has 0."""
        return (self.path.count(".") + 1 if self.path else 0) + (self.kind != "module")


@dataclass(frozen=True)
class Picture:
    """Everything that a drawing shows, before it is laid out.

    Attributes:
        title: The heading.
        nodes: The nodes that are drawn, by key, with the attributes of ``to_networkx``.
        boxes: The modules and folds by key; the whole model comes first.
        edges: The keys of the two nodes of each line.
        regularizers: What the legend says, by the regularizer's name.
        badges: What acts at each node, by the node's key.
        chains: The keys of the boxes around each node, from the outermost, and the node's own key.
        layers: Finds the node that shows a parameter.
    """

    title: str
    nodes: Mapping[str, Mapping[str, Any]]
    boxes: Mapping[str, Box]
    edges: tuple[tuple[str, str], ...]
    regularizers: Mapping[str, str]
    badges: Mapping[str, tuple[Badge, ...]]
    chains: BoxPaths
    layers: Layers

    @cached_property
    def colour(self) -> dict[str, int]:
        """The number of each regularizer's colour."""
        return {name: i for i, name in enumerate(self.regularizers)}

    @cached_property
    def _parents(self) -> dict[str, str]:
        return {child: key for key, box in self.boxes.items() for child in box.children}

    def around(self, key: str) -> tuple[str, ...]:
        """Return the keys of the boxes around a node, the outermost first."""
        return self.chains[key][:-1]

    def outside(self, key: str) -> tuple[str, ...]:
        """Return the keys of the boxes around a box, the outermost first."""
        return _up(key, self._parents)[:-1]

    def stub(self, key: str) -> tuple[str, ...]:
        """Return the keys of the values that a node or box reads by a stub."""
        return self.boxes[self._parents[key]].stubs.get(key, ()) if key in self._parents else ()

    def span(self, key: str) -> tuple[str, str]:
        """Return the names of the first and of the last child of a fold, as its box shows them; for anything else, its own name twice."""
        box = self.boxes.get(key)
        if box is None or box.kind == "module":
            name = box.name if box else label_lines(self, key)[0]
            return name, name
        return self.span(box.children[0])[0], self.span(box.children[-1])[1]


def picture(seen: Viewed) -> Picture:
    """Choose the nodes to draw (sites and operations with several results), fold repeats, and group the nodes by module."""
    graph = as_networkx(seen)
    layers = Layers(graph)
    shown = badges(graph, seen, layers)
    if seen.against is not None:
        shown = compared_badges(graph, shown, seen.against)

    classes = dict(line.split("\t") for line in graph.graph["modules"].split("\n") if line)
    drawn = _drawn(graph, shown)
    called = {path for _, a in graph.nodes(data=True) for path in (*a.get("module_output", "").split(", "), a["module"])}
    chains = _chains(drawn, called)
    folder = _folder(drawn, chains, classes, shown)

    # Fold what would crowd the drawing, and count in each box what acts inside.
    parameters = [name for site in seen.traced.parameters for name in site.names]
    integers = [[key for key in chain if key in drawn] for chain in arithmetic(graph, parameters, lambda key: key in shown)]
    folder.fold([chain for chain in integers if len(chain) >= CHAIN], len(drawn) > SMALL)

    parents = {child: key for key, kids in folder.children.items() for child in kids}
    boxes = _boxes(seen.title, folder, classes, parents)
    # The folds are boxes between modules and nodes, so the chains are made anew.
    chains = {key: _up(key, parents) for key in drawn}
    for key in drawn:
        for box in chains[key][:-1]:
            boxes[box].nodes += 1
            for badge in shown.get(key, ()):
                if badge.counted:
                    boxes[box].acts[badge.regularizer] += 1

    _link(drawn, boxes, chains)
    edges = tuple((start, end) for start, end in drawn.edges)
    nodes = {key: drawn.nodes[key] for key in drawn}
    badged = {key: shown[key] for key in drawn if key in shown}
    return Picture(heading(seen), nodes, boxes, edges, legend(seen), badged, chains, layers)


def _chains(drawn: nx.DiGraph[str], called: Collection[str]) -> BoxPaths:
    """Return the keys of the boxes around each node, from the outermost, and the node's own key.

    A module that is never called, such as a ModuleList, has no box if something else runs between
    its parts: the parts are then drawn among what runs between them. In a box, they would seem to
    run at once, with lines that lead out of the box and back into it.

    Args:
        drawn: The nodes; the attribute ``box`` becomes the path of the innermost box that is drawn.
        called: The paths of the modules that are called.
    """
    around: BoxPaths = {}
    inside: dict[str, set[str]] = {}
    for key, attributes in drawn.nodes(data=True):
        names = attributes["box"].split(".") if attributes["box"] else []
        around[key] = tuple(f"{'.'.join(names[:i])}/" for i in range(len(names) + 1))
        # The whole model, the first of these boxes, is never taken apart.
        for box in around[key][1:]:
            if box[:-1] not in called:
                inside.setdefault(box, set()).add(key)
    split = {box for box, keys in inside.items() if any(key in keys for key in _after(drawn, keys))}
    chains: BoxPaths = {}
    for key, boxes in around.items():
        chains[key] = (*(box for box in boxes if box not in split), key)
        drawn.nodes[key]["box"] = chains[key][-2][:-1]
    return chains


def _after(drawn: nx.DiGraph[str], keys: Collection[str]) -> Iterator[str]:
    """Yield the nodes to which a path leads that starts among ``keys`` and leaves them."""
    ahead = [end for key in keys for end in drawn.successors(key) if end not in keys]
    found = set[str]()
    while ahead:
        if (key := ahead.pop()) not in found:
            found.add(key)
            yield key
            ahead += drawn.successors(key)


def _folder(
    drawn: nx.DiGraph[str], chains: BoxPaths, classes: Mapping[str, str], shown: Mapping[str, tuple[Badge, ...]]
) -> Folder:  # fmt: skip
    """Return the modules with their children, before anything is folded."""
    children: dict[str, dict[str, None]] = {"/": {}}
    for chain in chains.values():
        for outer, inner in pairwise(chain):
            children.setdefault(outer, {})[inner] = None
    pairs: dict[str, set[tuple[str, str]]] = {}
    for start, end in drawn.edges:
        box, pair = _levels(chains[start], chains[end])[0]
        pairs.setdefault(box, set()).add(pair)
    ops = {key: str(attributes["op"]) for key, attributes in drawn.nodes(data=True)} | {key: classes.get(key[:-1], "") for key in children}
    acts = {key: tuple(badge.label for badge in several) for key, several in shown.items()}
    marks = {key: (*acts.get(key, ()), str(attributes.get("own_dropout", ""))) for key, attributes in drawn.nodes(data=True)}
    return Folder({key: list(kids) for key, kids in children.items()}, ops, marks, pairs)


def _up(key: str, parents: Mapping[str, str]) -> tuple[str, ...]:
    """Return the keys from the whole model down to a node."""
    chain = [key]
    while chain[-1] in parents:
        chain.append(parents[chain[-1]])
    return tuple(reversed(chain))


def _boxes(title: str, folder: Folder, classes: Mapping[str, str], parents: Mapping[str, str]) -> dict[str, Box]:
    """Make the boxes of modules and folds, without lines and counts."""
    boxes = {}
    for key, kids in folder.children.items():
        if key in folder.folds:
            fold = folder.folds[key]
            boxes[key] = Box(key.partition("/*")[0], "", fold.label, list(kids), key=key, kind=fold.kind)
        else:
            path, outer = key[:-1], parents.get(key, "/").partition("/")[0]
            name, op = path.removeprefix(f"{outer}.") if outer else path, classes.get(path, "") if path else title
            boxes[key] = Box(path, name, op, list(kids), key=key, repeats=folder.repeated.get(key, ""))
    return boxes


def _link(drawn: nx.DiGraph[str], boxes: Mapping[str, Box], chains: BoxPaths) -> None:
    """Add the lines to the boxes that they lie in, and the stubs in place of lines."""
    place = {child: i for box in boxes.values() for i, child in enumerate(box.children)}
    links: dict[str, dict[tuple[str, str], None]] = {key: {} for key in boxes}
    # by box and child: the values from outside the box
    entering: dict[str, dict[str, dict[str, None]]] = {key: {} for key in boxes}
    for start, end in drawn.edges:
        for box, pair in _levels(chains[start], chains[end]):
            links[box][pair] = None
            if pair[0] == IN:
                entering[box].setdefault(pair[1], {})[start] = None
    for key, pieces in links.items():
        boxes[key].stubs |= _stubs(boxes[key], pieces, entering[key])
        for start, end in pieces:
            back = start != IN and end != OUT and place[start] > place[end]
            if start != IN or end not in boxes[key].stubs:
                boxes[key].links.append(BoxLink(start, end, back))


SHARED = 4  # as many blocks as this read a value from outside: most of its lines become stubs


def _stubs(box: Box, pieces: Collection[tuple[str, str]], entering: Mapping[str, Collection[str]]) -> dict[str, tuple[str, ...]]:
    """Find the blocks to which no line from the border is drawn, with the keys of the values that they read from outside the box.

    They are blocks that follow one another and read the same values, such as a mask: a line to each
    would run past all blocks before it.
    """
    between = [pair for pair in pieces if IN not in pair and OUT not in pair]
    # Blocks that are connected to many others do not follow one another.
    if not (box.repeats or box.kind in ("repeats", "part")) or len(between) > 2 * len(box.children):
        return {}
    readers = Counter(value for values in entering.values() for value in values)
    fed = {end for _, end in between}
    return {
        child: tuple(values) for child, values in entering.items() if child in fed and all(readers[value] >= SHARED for value in values)
    }


def _drawn(graph: nx.DiGraph[str], shown: Mapping[str, tuple[Badge, ...]]) -> nx.DiGraph[str]:
    """Return the graph without the nodes that are not drawn: additions that badges show, sizes, and inputs that nothing reads."""
    drawn = without_additions(graph, shown)
    nodes = drawn.nodes
    for key in reversed(list(graph)):
        if key not in drawn:
            continue
        attributes = nodes[key]
        why_not, readers = attributes.get("why_not"), list(drawn.successors(key))
        # A tuple that was taken out of a tuple: what reads it takes a value out of it in turn.
        if why_not == "a tuple" and readers and attributes["op"] == "getitem":
            bypass(drawn, key)
        elif attributes["kind"] == "other" and readers and all(nodes[reader]["kind"] == "output" for reader in readers):
            bypass(drawn, key)  # the node makes the object that the model returns
        elif (
            why_not == "no tensor" or attributes["kind"] in ("other", "read")
            or (not readers and (why_not == "a tuple" or attributes["call"] == "placeholder"))
        ):  # fmt: skip
            drawn.remove_node(key)
    return drawn


def _levels(start: tuple[str, ...], end: tuple[str, ...]) -> list[tuple[str, tuple[str, str]]]:
    """Split a line between two nodes into pieces that each lie within one box. Return the box's key and the two ends of each piece."""
    shared = 0
    # this ends at the last keys at the latest, because they differ
    while start[shared + 1] == end[shared + 1]:
        shared += 1
    pieces = [(start[shared], (start[shared + 1], end[shared + 1]))]
    pieces += [(box, (child, OUT)) for box, child in zip(start[shared + 1 : -1], start[shared + 2 :], strict=True)]
    pieces += [(box, (IN, child)) for box, child in zip(end[shared + 1 : -1], end[shared + 2 :], strict=True)]
    return pieces


def unfolded(shown: Picture, level: int | None = None) -> frozenset[str]:
    """Return the keys of the boxes to unfold.

    ``level``: unfold the modules above this depth, and what repeats in them. With None, unfold as
    many whole depths as ``ROOM`` allows, but no repeats.
    """
    boxes = shown.boxes
    if level is not None:
        return frozenset(key for key, box in boxes.items() if box.depth < level + (box.kind != "module") and box.kind != "arithmetic")
    opened = frozenset(("/",))
    for depth in range(1, 1 + max(box.depth for box in boxes.values())):
        plain = {key for key, box in boxes.items() if box.depth <= depth and box.kind == "module" and not box.repeats}
        # A module within a fold stays folded, because the fold does.
        more = frozenset(key for key in plain if plain.issuperset(shown.outside(key)))
        if sum(child not in more for key in more for child in boxes[key].children) > ROOM:
            return opened
        opened = more
    return opened


def label_lines(shown: Picture, key: str) -> tuple[str, str]:
    """Return the two lines of text in a node or a folded box."""
    if key in shown.boxes:
        box = shown.boxes[key]
        if box.kind == "module":
            return f"{box.name} {box.repeats or box.op}".strip(), f"{box.nodes} inside"
        names = [shown.span(child) for child in (box.children[0], box.children[-1])]
        return box.op, f"{names[0][0]} … {names[1][1]}"

    attributes = shown.nodes[key]
    if attributes["kind"] == "addition":
        strength = f" {attributes['strength']:g}" if "strength" in attributes else ""
        return attributes["regularizer"] or attributes["added"], f"{attributes['site'] or attributes['op']}{strength}"

    # a get_attr is shown by what it reads
    full = attributes["target"] if attributes["call"] == "get_attr" else attributes["name"]
    name = full.removeprefix(f"{attributes['box']}.") if attributes["box"] else full
    if attributes["target"] == "getitem" and attributes["op"] != "getitem" and ":" not in name:
        # a module's first output; the call of the module is drawn too, by the bare name
        name += ":out"

    op = attributes["op"] if attributes["op"] != name else ""
    # of native dropout, with what happens to it
    rate = f"rate {attributes['own_rate']:g}" if "own_rate" in attributes else ""
    native = f"native: {attributes['own_dropout']}" if "own_dropout" in attributes else ""
    return name, " ".join(filter(None, [op, attributes.get("shape", ""), rate, native]))


def stub_text(shown: Picture, key: str, width: float = float("inf")) -> str:
    """Return the names of the values that the stub at a block stands for; ``""`` if it has no stub.

    ``width``: the block's; the last parts of the names are shortened to half of it, for the line in
    the middle.
    """
    names = [str(shown.nodes[value]["name"]) for value in shown.stub(key)]
    text = ", ".join(names if width == float("inf") else [name.rpartition(".")[2] for name in names])
    most = max(4.0, (width / 2 - 13) / 0.9 / WIDE)
    return text if len(text) <= most else f"{text[: int(most) - 1]}…"


def text_width(text: str) -> float:
    """Return the width of a text in pixels, in a monospaced font of size 10; a wide East Asian character counts as two."""
    return WIDE * sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in text)
