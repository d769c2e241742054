"""What is read after a write, by the rule of docs/selectors.md: later statements read a value as the last write has left it.

A write that returns what it writes into (``h.add_(1)``) gives its name to that value from then on. Any other write (``h[0] = 1``), and a
write into what a value is a view of, gives the value a node ``written``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from fuzz.program import CONSTANT, INTEGER, UNKNOWN_VIEW, VIEW, WRITE, End, Flat, FlatNode, Flattener, Node, Var

# Of ``reshape``, ``flatten`` and the like, which may copy, nothing is told; into parts (``split``), torch refuses to write if they train.
SURE_VIEWS = {
    "view", "view_as", "t", "transpose", "swapaxes", "swapdims", "permute", "movedim", "moveaxis", "squeeze", "unsqueeze", "select",
    "narrow", "expand", "expand_as", "diagonal", "unfold", "unflatten", "detach", "getitem",
}  # fmt: skip
_NAME = re.compile(r"\b[a-z]\w*\b")


class WrittenInBranch(Exception):
    """A write in a branch on the mode: what is read later would depend on the mode."""


def settle(flat: Flattener) -> Flattener:
    """Let the statements of a flat source read what writes have left."""
    settled = Settled(flat.flats, flat.returned, flat.count)
    for var in flat.inputs[len(flat.inputs) - flat.program.variadic :]:  # taken out of ``*rest``, so no inputs themselves
        settled.made[var.key] = _Made(0)
        settled.keys[var.name] = var.key
    settled.run()
    flat.flats, flat.returned, flat.count = settled.flats, settled.returned, settled.count
    return flat


@dataclass
class _Made:
    """A value: where it was made, what it is a view of, and whether it is that very tensor."""

    at: int
    of: int | None = None
    itself: bool = False
    scope: str = ""


@dataclass
class Settled:
    """The flat source, in which every statement reads what writes have left. ``count``: the number of the last variable."""

    flats: list[Flat]
    returned: list[Var]
    count: int
    made: dict[int, _Made] = field(default_factory=dict)
    now: dict[int, Var] = field(default_factory=dict)  # what stands for a value, by its key
    names: dict[str, str] = field(default_factory=dict)  # the variable that stands for another one
    keys: dict[str, int] = field(default_factory=dict)  # the value that a variable has
    at: int = 0

    def run(self) -> None:
        self.flats = [self._flat(i, flat) for i, flat in enumerate(self.flats)]
        self.returned = [Var(self._text(now.name), now.key) for now in map(self._var, self.returned)]

    def _var(self, var: Var) -> Var:
        while var.key in self.now:
            var = self.now[var.key]
        return var

    def _key(self, key: int) -> int:
        return self._var(Var("", key)).key

    def _text(self, line: str) -> str:
        def last(found: re.Match[str]) -> str:
            name = found[0]
            while name in self.names:
                name = self.names[name]
            return name

        return _NAME.sub(last, line)

    def _flat(self, number: int, flat: Flat) -> Flat:
        if flat.eval_nodes is not None and any(node.node.is_a(WRITE) for node in (*flat.nodes, *flat.eval_nodes)):
            raise WrittenInBranch
        lines, nodes, places = list[str](), list[FlatNode](), dict[int, int]()
        for i, text in enumerate(flat.lines):
            line = self._text(text)
            lines.append(line)
            if (copied := re.fullmatch(r"(\w+_in) = (\w+)", line)) and copied[2] in self.keys:
                self.keys[copied[1]] = self.keys[copied[2]]
            for at, each in enumerate(flat.nodes):
                if each.node.line == i:
                    places[at] = len(nodes)
                    nodes.append(self._node(each, len(lines) - 1, places))
                    for var, read in self._after(nodes[-1], number, flat, at):
                        lines.append(f"{var.name} = {read.name}")
                        own = Node("written", reads="a", line=len(lines) - 1)
                        nodes.append(FlatNode(own, var, (read.key,), each.module or each.scope))
        changed = replace(flat, lines=lines, nodes=nodes)
        if flat.eval_nodes is not None:
            changed.eval_lines = [self._text(line) for line in flat.eval_lines or ()]
            changed.eval_nodes = [self._node(each, each.node.line, {}) for each in flat.eval_nodes]
        changed.ends = [End(e.path, e.kind, tuple((self._key(key), *more) for key, *more in e.parts)) for e in flat.ends]
        return changed

    def _node(self, flat: FlatNode, line: int, places: dict[int, int]) -> FlatNode:
        """A node with what it reads now, noted as a value."""
        self.at += 1
        node, reads = flat.node, tuple(map(self._key, flat.reads))
        if node.port is not None:
            node = replace(node, port=(places.get(node.port[0], node.port[0]), *node.port[1:]))
        itself = self._gives_itself(node)
        view = itself or node.base == "written" or ((node.is_a(VIEW) or node.is_a(UNKNOWN_VIEW)) and node.base in SURE_VIEWS)
        self.made[flat.var.key] = _Made(self.at, reads[node.into or 0] if view and reads else None, itself, flat.module or flat.scope)
        var = Var(self._text(flat.var.name), flat.var.key)
        self.keys[var.name] = var.key
        return replace(flat, node=replace(node, line=line), reads=reads, var=var)

    def _gives_itself(self, node: Node) -> bool:
        return node.is_a(WRITE) and node.into == 0 and not node.is_a(CONSTANT) and not node.is_a(INTEGER)

    def _after(self, write: FlatNode, number: int, flat: Flat, at: int) -> Iterator[tuple[Var, Var]]:
        """Let what comes after a write read what it leaves, and yield the values ``written`` that are needed for that."""
        node = write.node
        if not node.is_a(WRITE) or node.into is None:
            return
        key = write.reads[node.into]
        later = [*flat.nodes[at + 1 :], *(each for f in self.flats[number + 1 :] for each in (*f.nodes, *(f.eval_nodes or ())))]
        views = [each for each in self._views(key) if each != write.var.key]
        if self._gives_itself(node):
            if self._readers(key, later):
                self._stands_for(write.var, key)
        else:
            views = [key, *views]
        for each in views:
            readers = self._readers(each, later)
            # of two writes with nothing between them, the first is a module's output if the second is beyond its forward
            if readers and (not self._is_written(readers[0], each) or self._names_module(each, write, number)):
                self.count += 1
                var = Var(f"v{self.count}_w", -self.count)
                self.at += 1
                self.made[var.key] = _Made(self.at, each, True, write.module or write.scope)
                read = Var(next(name for name, known in self.keys.items() if known == each), each)
                self._stands_for(var, each)
                self.keys[var.name] = var.key
                yield var, read

    def _stands_for(self, var: Var, key: int) -> None:
        for name in [name for name, known in self.keys.items() if known == key and name != var.name]:
            self.names[name] = var.name
            del self.keys[name]
        self.now[key] = var

    def _readers(self, key: int, later: list[FlatNode]) -> list[FlatNode | None]:
        """The nodes that read a value from here on; None is the output."""
        if key not in self.made:  # an input
            return []
        found: list[FlatNode | None] = [each for each in later if key in map(self._key, each.reads)]
        return found + [None] * any(self._key(var.key) == key for var in self.returned)

    def _names_module(self, key: int, write: FlatNode, number: int) -> bool:
        """Whether a value is the output of a module within whose forward the write stands."""
        ends = [end for flat in self.flats[number:] for end in flat.ends if key in (self._key(part) for part, *_ in end.parts)]
        return any(f"{write.module or write.scope}.".startswith(f"{end.path}.") for end in ends)

    def _is_written(self, node: FlatNode | None, key: int) -> bool:
        into = None if node is None or not node.node.is_a(WRITE) else node.node.into
        return node is not None and into is not None and self._key(node.reads[into]) == key

    def _views(self, key: int) -> Iterator[int]:
        """What a value is a view of, with other names of that tensor, and then the views of the value."""
        found, waiting = dict[int, None](), [key]
        for each in waiting:
            of = self.made[each].of if each in self.made else None
            more = [] if of is None else [of]
            more += [other for other, made in self.made.items() if made.of == each and made.itself]
            waiting += [other for other in more if other not in found and other != key]
            found |= dict.fromkeys(more)
        waiting = [key]
        for each in waiting:
            more = [other for other, made in self.made.items() if made.of == each and other not in found]
            waiting += more
            found |= dict.fromkeys(more)
        return (each for each in found if each != key)
