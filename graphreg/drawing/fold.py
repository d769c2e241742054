"""Folds what a reader need not see at once: repeated blocks, chains of arithmetic on integers and masks, and long sequences of nodes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import networkx as nx

FoldKind = Literal["repeats", "item", "arithmetic", "part"]
SMALL = 40  # a drawing of at most this many nodes shows repeats and sequences as they are
# the repetitions that a fold has at least, and the nodes and modules of one repetition at most
LEAST, LONGEST = 3, 24
# the children of a part, the parts of a sequence, and the children that a box may have without
# parts
PART, PARTS, CROWDED = 16, 20, 32
CHAIN = 2  # the operations on integers and masks that are folded, at least


@dataclass
class Fold:
    """A box that is no module.

    Attributes:
        kind: ``"repeats"``: equal blocks; ``"item"``: one repetition of several children;
            ``"arithmetic"``: operations on integers and masks; ``"part"``: a part of a long
            sequence.
        label: The first line of the folded box.
        members: The keys of its children.
    """

    kind: FoldKind
    label: str
    members: list[str]


@dataclass
class Folder:
    """Folds the children of every module.

    Attributes:
        children: The children of each module by key, in the order of the graph; changed as they are
            folded.
        ops: The class or function of each child, by key.
        marks: What else tells children apart, by key: the regularizers that act there.
        pairs: For each module, the pairs of its children that a line connects.
        folds: The boxes that were made, by key.
        repeated: For modules that hold nothing but repeats: the label of the repeats.
    """

    children: dict[str, list[str]]
    ops: Mapping[str, str]
    marks: Mapping[str, tuple[str, ...]]
    pairs: Mapping[str, set[tuple[str, str]]]
    folds: dict[str, Fold] = field(default_factory=dict)
    repeated: dict[str, str] = field(default_factory=dict)
    _known: dict[Any, int] = field(default_factory=dict)
    _signatures: dict[tuple[str, bool], int] = field(default_factory=dict)

    def fold(self, chains: Iterable[Sequence[str]], large: bool) -> None:
        """Fold in every module. ``chains``: the operations on integers and masks to fold, by module. ``large``: fold repeats, too."""
        modules = list(self.children)
        # Computed before anything is folded, because a fold changes the children of its module.
        signed = {key: (self._signature(key, True), self._signature(key, False)) for kids in self.children.values() for key in kids}
        for chain in chains:
            box = next(box for box in modules if chain[0] in self.children[box])
            kids, taken = self.children[box], set(chain)
            key = self._make(box, "arithmetic", "integer and mask arithmetic", [kid for kid in kids if kid in taken])
            self.children[box] = [key if kid == chain[0] else kid for kid in kids if kid == chain[0] or kid not in taken]

        for box in modules if large else ():
            kids = self._repeats(box, self.children[box], signed)
            self.children[box] = self._parts(box, box, kids)

    def _signature(self, key: str, marked: bool) -> int:
        """Return a number that children have in common if they have the same structure; ``marked``: and the same regularizers."""
        if (key, marked) not in self._signatures:
            kids = self.children.get(key, ())
            places = {kid: i for i, kid in enumerate(kids)}
            lines = frozenset((places[a], places[b]) for a, b in self.pairs.get(key, ()) if a in places and b in places)
            inner = tuple(self._signature(kid, marked) for kid in kids)
            what = (self.ops.get(key, ""), self.marks.get(key, ()) if marked else (), inner, lines)
            # A number for each structure, so that large blocks are compared in one step.
            self._signatures[key, marked] = self._known.setdefault(what, len(self._known))
        return self._signatures[key, marked]

    def _make(self, box: str, kind: FoldKind, label: str, members: list[str]) -> str:
        key = f"{box}*{len(self.folds)}"
        self.folds[key] = Fold(kind, label, members)
        self.children[key] = members
        return key

    def _repeats(self, box: str, kids: list[str], signed: Mapping[str, tuple[int, int]]) -> list[str]:
        # What has no signature equals nothing else: it gets a negative number of its own.
        strict, loose = (runs([signed[kid][i] if kid in signed else -1 - j for j, kid in enumerate(kids)]) for i in (0, 1))
        # If regularizers act in some of many equal blocks only, their structure alone counts.
        found = loose if len(strict) > 8 and len(strict) > 1.5 * len(loose) else strict
        made = []
        for start, period, count in found:
            one = kids[start : start + period]
            # Single operations are folded only where the box is crowded.
            if count == 1 or (len(kids) <= CROWDED and not any(kid in self.children for kid in one)):
                made += kids[start : start + period * count]
                continue
            starts = range(start, start + period * count, period)
            parts = [kids[i : i + period] for i in starts]
            items = [part[0] if len(part) == 1 else self._make(box, "item", self._unit(part), part) for part in parts]
            label = f"{self._unit(one)} × {count}"
            # A module of repeats alone, such as a ModuleList, is the box of the repeats itself.
            if period * count == len(kids) and box != "/":
                self.repeated[box] = label
                return items
            made.append(self._make(box, "repeats", label, self._parts(box, box, items)))
        return made

    def _unit(self, kids: Sequence[str]) -> str:
        ops = [self.ops.get(kid, "") for kid in kids]
        if len(set(ops)) == 1:
            return ops[0] if len(ops) == 1 else f"{len(ops)} {ops[0]}"
        return f"({', '.join(ops)})" if len(ops) <= 3 else f"{len(ops)} operations"

    def _parts(self, box: str, module: str, kids: list[str]) -> list[str]:
        """Split a long sequence of children into parts, where the fewest lines are cut."""
        if len(kids) <= CROWDED:
            return kids
        count = min(PARTS, -(-len(kids) // PART))
        crossing = self._crossing(module, kids)
        cuts, size = [0], len(kids) / count
        for i in range(1, count):
            around = range(max(cuts[-1] + 1, round((i - 0.3) * size)), min(len(kids), round((i + 0.3) * size)) + 1)
            cuts.append(min(around, key=lambda at: (crossing[at], abs(at - i * size))))
        pieces = [kids[a:b] for a, b in zip(cuts, [*cuts[1:], len(kids)], strict=True)]
        return [self._make(box, "part", f"part {i} of {count}", self._parts(box, module, piece)) for i, piece in enumerate(pieces, 1)]

    def _crossing(self, module: str, kids: Sequence[str]) -> list[int]:
        """Return how many lines lie across each gap between the children: before the first, before the second, and so on."""
        place = {one: i for i, kid in enumerate(kids) for one in self._inside(kid)}
        steps = [0] * (len(kids) + 2)
        for a, b in self.pairs.get(module, ()):
            if a in place and b in place and place[a] != place[b]:
                low, high = sorted((place[a], place[b]))
                # A line adds 1 to each gap between its ends: it steps up at one, down at the other.
                steps[low + 1] += 1
                steps[high + 1] -= 1
        counts, now = [], 0
        for step in steps[: len(kids) + 1]:
            now += step
            counts.append(now)
        return counts

    def _inside(self, key: str) -> list[str]:
        return [one for kid in self.folds[key].members for one in self._inside(kid)] if key in self.folds else [key]


def runs(numbers: Sequence[int]) -> list[tuple[int, int, int]]:
    """Split a sequence into runs that repeat, and single numbers: for each the start, the period and the number of repetitions."""
    found, i, n = [], 0, len(numbers)
    while i < n:
        best = (1, 1, 1)
        for period in range(1, min(LONGEST, (n - i) // LEAST) + 1):
            count = 1
            while all(numbers[i + count * period + j] == numbers[i + j] if i + count * period + j < n else False for j in range(period)):
                count += 1
            # The run that covers most wins; of equal ones, that with the shortest period.
            if count >= LEAST and count * period > best[0]:
                best = (count * period, period, count)
        found.append((i, best[1], best[2]))
        i += best[0]
    return found


FLOATING = ("float", "bfloat", "complex")


def arithmetic(graph: nx.DiGraph[str], parameters: Iterable[str], acts: Callable[[str], bool]) -> list[list[str]]:
    """Find the operations on integers and masks alone, in chains that are connected and lie in one module.

    Args:
        graph: The whole graph, with the nodes that are not drawn.
        parameters: The names of the model's parameters.
        acts: Whether a regularizer acts at a node.
    """
    nodes, known, folded = graph.nodes, set(parameters), set[str]()
    # in the order of the graph, so that what a node reads was looked at before the node
    for key in graph:
        a, reads = nodes[key], list(graph.predecessors(key))
        dtype = a.get("dtype", "")
        if a["kind"] != "site" or a["call"] not in ("call_function", "call_method") or not dtype or acts(key) or a.get("role"):
            continue

        plain = [nodes[read].get("dtype", "") for read in reads]
        data = any(
            nodes[read]["kind"] in ("addition", "call") or nodes[read].get("target") in known
            or (read not in folded and of.startswith(FLOATING)) or (nodes[read]["call"] == "call_module" and not of)
            for read, of in zip(reads, plain, strict=True)
        )  # fmt: skip
        # A floating-point value counts, too, if folded ones make it, as an additive mask.
        if not data and (not dtype.startswith(FLOATING) or any(read in folded for read in reads)):
            folded.add(key)

    within: nx.Graph[str] = nx.Graph()
    within.add_nodes_from(key for key in graph if key in folded)
    within.add_edges_from((a, b) for a, b in graph.edges if a in folded and b in folded and nodes[a]["box"] == nodes[b]["box"])
    order = {key: i for i, key in enumerate(graph)}
    chains = [sorted(part, key=order.__getitem__) for part in nx.connected_components(within)]
    return [chain for chain in chains if len(chain) >= CHAIN]
