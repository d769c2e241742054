"""The sites of a program: their names, roles and kinds, by the rules of docs/selectors.md, worked out without the engine."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from fuzz.matching import Name, Place
from fuzz.program import (
    CONSTANT,
    DROPOUT,
    INTEGER,
    LIST,
    NORM,
    PARAMETER,
    PRODUCT,
    UNKNOWN_VIEW,
    VIEW,
    WRITE,
    Flat,
    FlatNode,
    Flattener,
    Program,
)  # fmt: skip


class Counter:
    """Gives names: the first as it is, repeats with ``_1``, ``_2``; a module's own path is always that module's."""

    def __init__(self, paths: Iterable[str]) -> None:
        self.paths, self.used = set(paths) - {""}, set[str]()

    def module(self, path: str) -> str:
        return self._first(path, [] if path in self.used else [path])

    def operation(self, scope: str, base: str) -> str:
        name = f"{scope}.{base}" if scope else base
        return self._first(name, [] if name in self.used or name in self.paths else [name])

    def _first(self, name: str, candidates: list[str]) -> str:
        count = 1
        while not candidates:
            if (found := f"{name}_{count}") not in self.used and found not in self.paths:
                candidates = [found]
            count += 1
        self.used.add(candidates[0])
        return candidates[0]


WITH_PARAMETERS = {"Linear", "Conv1d", "LayerNorm", "BatchNorm1d", "LSTM", "GRU", "RNN", "GRUCell", "RNNCell", "Embedding"}


@dataclass
class Value:
    """What is known of one value: by its key in the flat source."""

    key: int
    names: list[Name]
    scope: str
    node: FlatNode | None
    variable: str
    data: bool = False
    deep: bool = False
    weights: bool = False
    norm: bool = False
    role: str = ""
    used: bool = False
    selectable: bool = True
    origin: int = 0
    unsure: bool = False
    trains: bool = False  # whether a parameter reaches it


@dataclass
class Table:
    """The values of a program in one mode, in order."""

    values: dict[int, Value] = field(default_factory=dict)
    roles_sure: bool = True

    def before(self, key: int) -> set[int]:
        """The values that a value was made of."""
        found, waiting = set[int](), [key]
        while waiting:
            value = self.values.get(waiting.pop())
            for read in value.node.reads if value is not None and value.node is not None else ():
                if read not in found:
                    found.add(read)
                    waiting.append(read)
        return found

    def chains(self, path: str) -> dict[str, int]:
        """The calls of a cell, each with the number of its sequence: a call that reads none before it begins one."""
        calls = [v for v in self.values.values() if any(name.module == path and name.default for name in v.names)]
        found: dict[int, int] = {}
        for call in calls:
            made_of = self.before(call.key)
            earlier = [key for key in found if key in made_of]
            found[call.key] = found[earlier[-1]] if earlier else len(set(found.values()))
        return {call.names[0].text: found[call.key] for call in calls}

    def places(self) -> list[Place]:
        return [
            Place(v.names, "value", v.role if v.selectable else "", v.norm, v.used, v.unsure, usable=v.selectable, trains=v.trains)
            for v in self.values.values()
            if v.names
        ]


def table(program: Program, flat: Flattener, paths: Iterable[str], mode: str) -> Table:
    """Names and roles in one mode, ``train`` or ``eval``."""
    counter, found = Counter(paths), Table()
    plain = len(program.inputs) - program.variadic
    for var, (name, text) in zip(flat.inputs[:plain], program.inputs, strict=False):
        names = [Name(counter.operation("", name), "input")]
        found.values[var.key] = Value(var.key, names, "", None, var.name, data=True, selectable="randint" not in text, origin=var.key)
    if program.variadic:
        counter.operation("", "rest")
        for var in flat.inputs[plain:]:
            own = Name(counter.operation("", "getitem"), "getitem")
            found.values[var.key] = Value(var.key, [own], "", None, var.name, data=True, origin=var.key)
    walk = _Walk(found, counter)
    for each in flat.flats:
        walk.flat(each, mode)
    walk.finish(flat)
    return found


class _Walk:
    def __init__(self, found: Table, counter: Counter) -> None:
        self.found, self.values, self.counter = found, found.values, counter
        self.order: list[FlatNode] = []
        self.sources: dict[int, list[Name]] = {}
        self.writers: set[int] = set()
        self.written: dict[int, list[int]] = {}

    def flat(self, flat: Flat, mode: str) -> None:
        nodes = flat.eval_nodes if mode == "eval" and flat.eval_nodes is not None else flat.nodes
        for node in nodes:
            self._node(node, nodes)
        for end in flat.ends:
            name = self.counter.module(end.path)
            for key, ports, default in end.parts:
                if key in self.values:
                    label = Name(name, end.kind, ports, default, end.path)
                    own = self.values[key]
                    if label not in own.names and own.names:
                        own.names.append(label)
                    made_by = self.values[self._origin(own)]
                    is_product = made_by.node is not None and made_by.node.node.is_a(PRODUCT) and made_by.data
                    own.norm |= end.kind.endswith("Norm") and not is_product

    def _node(self, flat: FlatNode, nodes: list[FlatNode]) -> None:
        node, key = flat.node, flat.var.key
        reads = [self.values[r] for r in flat.reads if r in self.values]
        value = Value(key, self._names(flat, nodes), flat.module or flat.scope, flat, flat.var.name, origin=key)
        value.data = any(r.data for r in reads)
        value.weights = not value.data and (node.is_a(PARAMETER) or any(r.weights for r in reads))
        product = node.is_a(PRODUCT) and value.data
        if product:
            for read in reads:
                origin = self.values[self._origin(read)]
                if read.data and origin.deep and origin.data:
                    origin.role = "hidden" if origin.role != "input" else origin.role
        if any(r.node is not None and r.node.node.is_a(CONSTANT) for r in reads):  # what a factory made, and something wrote into
            self._reads_constant(value, reads)
        value.deep = product or any(r.deep for r in reads if r.data)
        if node.is_a(WRITE) and value.deep and not all(r.deep for r in reads):
            self.found.roles_sure = False  # what is written into has other names, too
        value.norm = node.is_a(NORM)
        value.trains = (any(r.trains for r in reads) or node.is_a(PARAMETER) or flat.kind in WITH_PARAMETERS) and node.base != "detach"
        value.selectable = bool(flat.var.name) and not any(node.is_a(kind) for kind in (LIST, INTEGER, PARAMETER, CONSTANT))
        if node.is_a(UNKNOWN_VIEW):
            self.found.roles_sure = False
        if not node.is_a(CONSTANT):
            self.values[key] = value
        elif flat.var.name:
            value.names = []
            self.values[key] = value
        self.order.append(flat)

    def _reads_constant(self, value: Value, reads: list[Value]) -> None:
        """A write into what a factory made hands on what it writes; a read of that is data, of which the roles are not told here."""
        assert value.node is not None
        for read in reads:
            if read.node is not None and read.node.node.is_a(CONSTANT):
                if value.node.node.is_a(WRITE):
                    read.data, read.trains = read.data or value.data, read.trains or any(r.trains for r in reads)
                else:
                    value.data |= read.data
                    self.found.roles_sure = False

    def _names(self, flat: FlatNode, nodes: list[FlatNode]) -> list[Name]:
        node = flat.node
        if node.is_a(CONSTANT) or not node.base:
            if not flat.module:
                return []
            name = self.counter.module(flat.module)
            own = [Name(name, flat.kind, module=flat.module)]
        else:
            own = [Name(self.counter.operation(flat.scope, node.base), node.op or node.base.strip("_"))]
        self.sources[flat.var.key] = own
        if node.port is None:
            return own
        at, ports, default = node.port
        of = self.sources[nodes[at].var.key]
        return [*(Name(n.name, n.op, ports, default, n.module) for n in of), *own]

    def _origin(self, value: Value) -> int:
        while (flat := value.node) is not None and flat.reads and (flat.node.is_a(VIEW) or flat.node.is_a(DROPOUT)):
            source = self.values.get(flat.reads[0])
            if source is None:
                break
            value = source
        return value.key

    def finish(self, flat: Flattener) -> None:
        """What is returned, and what the output depends on."""
        returned = {var.key for var in flat.returned}
        for value in self.values.values():
            if value.node is None and value.names[0].op == "input":
                value.role = "input"
            elif not value.role and value.key in returned:
                value.role = "output"
        used = set(returned)
        for node in reversed(self.order):
            if node.var.key in used:
                used.update(node.reads)
        touched = set(used)
        for node in reversed(self.order):
            if node.var.key in touched or node.node.is_a(WRITE):
                touched.update(node.reads)
        for key, value in self.values.items():
            value.used, value.unsure = key in used, (key in touched) != (key in used)
