"""A random model as a list of statements, and its Python source: plain, with classes of its own for its blocks.

A statement has the text that stands in the source and, where that hides a value, a second spelling in which every value has
a name. It says of each operation in it what the trace will call it, what it reads and what kind of operation it is. So the
generator knows the sites of its model without asking the engine.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

VIEW, PRODUCT, DROPOUT, NORM, LIST, UNKNOWN_VIEW = "view", "product", "dropout", "norm", "list", "unknown view"
INTEGER, MODULE, PARAMETER, CONSTANT, WRITE, RANDOM = "integer", "module", "parameter", "constant", "write", "random"


@dataclass(frozen=True)
class Node:
    """One operation of a statement: ``base`` is what naming starts from, ``op`` what ``@`` matches.

    ``out``: the letter of the variable that carries its value, or nothing. ``reads``: the letters of the tensors that it reads, that
    whose view it may be in front; a digit is an earlier node of the statement. ``line``: of the second spelling, after which the value
    is there. ``port``: the node whose part it is, by its place in the statement, with the ports that name the part. ``module``: of a
    call of a layer, its attribute. ``into``: of a write, the place in ``reads`` of what is written; None if no value of the model is.
    """

    base: str
    op: str = ""
    out: str = ""
    reads: str = ""
    kinds: tuple[str, ...] = ()
    line: int = 0
    port: tuple[int, tuple[str, ...], bool] | None = None
    module: str = ""
    rate: float | None = None  # of a dropout of the model's own
    into: int | None = 0

    def is_a(self, kind: str) -> bool:
        return kind in self.kinds


@dataclass
class Body:
    """The forward of a block or of the model: ``params`` are the ids of what it is given, ``returns`` of what it gives back.

    ``form``: how several are given back. ``made``: lines of ``__init__``.
    """

    name: str
    params: list[int] = field(default_factory=list)
    stmts: list[Stmt] = field(default_factory=list)
    returns: list[int] = field(default_factory=list)
    form: str = "one"
    sequential: bool = False


@dataclass
class Stmt:
    """``ins`` and ``outs`` map letters to values; ``same`` a letter to that whose variable it keeps; ``hides``: not to be read again."""

    text: str
    ins: dict[str, int]
    nodes: tuple[Node, ...]
    outs: dict[str, int] = field(default_factory=dict)
    same: dict[str, str] = field(default_factory=dict)
    spelled: str = ""
    made: tuple[str, ...] = ()
    calls: Body | None = None
    attr: str = ""
    eval_nodes: tuple[Node, ...] | None = None  # of a branch on the mode
    eval_spelled: str = ""
    drops_out: tuple[str, ...] = ()  # letters whose assignment the plain text leaves away
    kind: str = ""
    hides: str = ""


@dataclass
class Program:
    """A model: its root, what it is called with, and how it stands."""

    root: Body
    inputs: list[tuple[str, str]]  # names and expressions
    variadic: int = 0  # how many of the last inputs go in by ``*rest``
    double: bool = False
    apart: tuple[str, ...] = ()  # blocks whose mode is set apart, to eval
    frozen: tuple[str, ...] = ()  # parameters that need no gradient
    input_grads: bool = True
    seed: int = 0
    ties: tuple[tuple[str, str], ...] = ()
    sized: bool = True  # whether it is traced with an example
    number: int = 0  # the seed that it was made from


@dataclass(frozen=True)
class Var:
    """A value in the flat source: the variable that holds it, and a key of its own."""

    name: str
    key: int


@dataclass(frozen=True)
class FlatNode:
    node: Node
    var: Var  # without a name where no variable has the value
    reads: tuple[int, ...]
    scope: str
    module: str = ""  # the path of the layer that it calls
    kind: str = ""  # that layer's class


@dataclass
class Flat:
    """A statement in the flat source, where blocks are written out. ``ends``: blocks whose calls end here."""

    lines: list[str]
    nodes: list[FlatNode]
    owner: str = ""
    eval_lines: list[str] | None = None
    eval_nodes: list[FlatNode] | None = None
    ends: list[End] = field(default_factory=list)


@dataclass(frozen=True)
class End:
    """The end of a block's call: its path, its class, and the values it gives with their ports."""

    path: str
    kind: str
    parts: tuple[tuple[int, tuple[str, ...], bool], ...]


class Flattener:
    """Writes a program out in one forward: every value has a variable, blocks are inlined."""

    def __init__(self, program: Program) -> None:
        self.program, self.count, self.flats = program, 0, list[Flat]()
        self.classes = dict(_classes(program.root, ""))
        env: dict[int, Var] = {}
        names = arguments(program)
        for at, name in zip(program.root.params, names, strict=True):
            env[at] = self._var(name)
        self.inputs = [env[at] for at in program.root.params]
        self.returned = self._body(program.root, "", env)

    def _var(self, name: str) -> Var:
        self.count += 1
        return Var(name, self.count)

    def _body(self, body: Body, path: str, env: dict[int, Var]) -> list[Var]:
        for stmt in body.stmts:
            self._stmt(stmt, path, env)
        return [env[at] for at in body.returns]

    def _stmt(self, stmt: Stmt, path: str, env: dict[int, Var]) -> None:
        if stmt.calls is not None:
            self._call(stmt, path, env)
            return
        owner = access(path)
        known = {letter: env[at] for letter, at in stmt.ins.items()}
        flat = Flat([], [], path)
        flat.lines, flat.nodes, after = self._lines(stmt, stmt.spelled or stmt.text, stmt.nodes, known, owner, path)
        if stmt.eval_nodes is not None and any(path == own or path.startswith(f"{own}.") for own in self.program.apart):
            flat.lines, flat.nodes, after = self._lines(stmt, stmt.eval_spelled, stmt.eval_nodes, known, owner, path)
        elif stmt.eval_nodes is not None:  # the same variables, as whichever branch ran has set them
            names = {letter: after[letter].name for letter in stmt.outs}
            flat.eval_lines, flat.eval_nodes, _ = self._lines(stmt, stmt.eval_spelled, stmt.eval_nodes, known, owner, path, names, after)
        self.flats.append(flat)
        for letter, at in stmt.outs.items():
            env[at] = after[letter]

    def _lines(
        self, stmt: Stmt, text: str, nodes: tuple[Node, ...], known: dict[str, Var], owner: str, path: str,
        names: dict[str, str] | None = None, end: dict[str, Var] | None = None,
    ) -> tuple[list[str], list[FlatNode], dict[str, Var]]:  # fmt: skip
        now, found, given = dict(known), list[FlatNode](), names or {}
        letters = {letter: var.name for letter, var in known.items()}
        for letter in dict.fromkeys([*(n.out for n in nodes if n.out), *stmt.outs]):
            if letter in stmt.same:
                letters[letter] = letters[stmt.same[letter]]
            elif letter not in letters:
                letters[letter] = given.get(letter) or f"v{self.count + 1}_{letter}"
                self.count += 1
        for node in nodes:
            reads = tuple(found[int(at)].var.key if at.isdigit() else now[at].key for at in node.reads)
            var = end[node.out] if end and node.out in stmt.outs else self._var(letters.get(node.out, ""))
            if node.out:
                now[node.out] = var
            module = join(path, node.module) if node.module else ""
            found.append(FlatNode(node, var, reads, path, module, self.classes.get(module, "") if module else ""))
        lines = text.format(S=owner, **letters).split("\n")
        return lines, found, now

    def _call(self, stmt: Stmt, path: str, env: dict[int, Var]) -> None:
        assert stmt.calls is not None
        body, inner = stmt.calls, join(path, stmt.attr)
        given = {at: env[stmt.ins[letter]] for at, letter in zip(body.params, stmt.ins, strict=True)}
        # what the block is given it may assign to: the caller's variable is another
        local: dict[int, Var] = {}
        start = Flat([], [], inner)
        for at, var in given.items():
            name = f"v{self.count + 1}_in"
            self.count += 1
            start.lines.append(f"{name} = {var.name}")
            local[at] = Var(name, var.key)
        self.flats.append(start)
        returned = self._body(body, inner, local)
        self.flats[-1].ends.append(End(inner, "Sequential" if body.sequential else body.name, tuple(_parts(body, returned))))
        for at, var in zip(stmt.outs.values(), returned, strict=True):
            env[at] = var


def _parts(body: Body, returned: list[Var]) -> Iterator[tuple[int, tuple[str, ...], bool]]:
    for i, var in enumerate(returned):
        if body.form == "one":
            yield var.key, ("out",), True
        elif body.form == "tuple":
            yield var.key, (("out", "0") if i == 0 else (str(i),)), i == 0
        else:  # a dict or a named tuple
            yield var.key, (PART_NAMES[body.form][i],), False


PART_NAMES = {"dict": ("main", "other", "third"), "Pair": ("first", "second"), "Both": ("left", "right")}


def _classes(body: Body, path: str) -> Iterator[tuple[str, str]]:
    """The paths of torch's layers, with their classes."""
    for stmt in body.stmts:
        for line in stmt.made:
            attr, _, value = line.partition(" = nn.")
            yield join(path, attr.removeprefix("{S}.")), value.partition("(")[0]
        if stmt.calls is not None:
            yield join(path, stmt.attr), stmt.calls.name
            yield from _classes(stmt.calls, join(path, stmt.attr))


def join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def access(path: str) -> str:
    """The expression of a module at a path."""
    if not path:
        return "self"
    if all(part.isidentifier() for part in path.split(".")):
        return f"self.{path}"
    return f"self.get_submodule({path!r})"


def arguments(program: Program) -> list[str]:
    """The variables that the inputs have in the flat source; those of ``*rest`` are taken out of it."""
    names = [name for name, _ in program.inputs]
    plain = len(names) - program.variadic
    return [*names[:plain], *(f"rest_{i}" for i in range(program.variadic))]


def bodies(body: Body) -> Iterator[Body]:
    """All blocks within a body, innermost first, each once."""
    seen = set[int]()
    for stmt in body.stmts:
        if stmt.calls is not None:
            for inner in (*bodies(stmt.calls), stmt.calls):
                if id(inner) not in seen:
                    seen.add(id(inner))
                    yield inner


class Plain:
    """The plain source of a program."""

    def __init__(self, program: Program) -> None:
        self.program = program

    def text(self) -> str:
        program = self.program
        lines = ["import torch", "import torch.nn.functional as F", "from torch import nn", "", "from fuzz.shapes import Both, Pair", ""]
        for body in bodies(program.root):
            if not body.sequential:
                lines += ["", *self._class(body, [f"a{i}" for i in range(len(body.params))])]
        names = [name for name, _ in program.inputs][: len(program.inputs) - program.variadic]
        lines += ["", *self._class(program.root, names), "", "", *self._ends()]
        return "\n".join(lines) + "\n"

    def _class(self, body: Body, names: list[str]) -> list[str]:
        made = list(dict.fromkeys(line for stmt in body.stmts for line in stmt.made))
        for stmt in body.stmts:
            if stmt.calls is not None:
                made += [line for line in [f"{{S}}.{stmt.attr} = {self._construct(stmt.calls)}"] if line not in made]
        root = body is self.program.root
        if root:
            made += [f"{{S}}.{one} = {{S}}.{other}" for one, other in self.program.ties]
        variadic = ["*rest"] if root and self.program.variadic else []
        lines = [f"class {body.name}(nn.Module):", "    def __init__(self):", "        super().__init__()"]
        lines += [f"        {line}" for entry in made for line in entry.format(S="self").split("\n")]
        lines += ["", f"    def forward({', '.join(['self', *names, *variadic])}):"]
        env = dict(zip(body.params, [*names, *(f"rest[{i}]" for i in range(self.program.variadic if root else 0))], strict=True))
        if variadic:
            lines += [f"        rest_{i} = rest[{i}]" for i in range(self.program.variadic)]
            env = dict(zip(body.params, [*names, *(f"rest_{i}" for i in range(self.program.variadic))], strict=True))
        for stmt in body.stmts:
            lines += [f"        {line}" for line in self._stmt(stmt, env)]
        lines.append(f"        return {returned(body, [env[at] for at in body.returns])}")
        return lines

    def _construct(self, body: Body) -> str:
        if not body.sequential:
            return f"{body.name}()"
        return f"nn.Sequential({', '.join(line.partition(' = ')[2] for stmt in body.stmts for line in stmt.made)})"

    def _stmt(self, stmt: Stmt, env: dict[int, str]) -> list[str]:
        letters = {letter: env[at] for letter, at in stmt.ins.items()}
        for letter, at in stmt.outs.items():
            letters[letter] = letters[stmt.same[letter]] if letter in stmt.same else f"h{at}"
            env[at] = letters[letter]
        text = stmt.text
        used = {at for body in [self.program.root, *bodies(self.program.root)] for at in _used(body)}
        for letter in stmt.drops_out:  # nobody reads it: a bare call
            if stmt.outs.get(letter) not in used:
                text = text.removeprefix(f"{{{letter}}} = ")
        return text.format(S="self", **letters).split("\n")

    def _ends(self) -> list[str]:
        program = self.program
        lines = ["def model():", f"    torch.manual_seed({program.seed})", f"    net = {program.root.name}()"]
        lines += [f"    net.get_parameter({name!r}).requires_grad_(False)" for name in program.frozen]
        lines += ["    net.double()"] if program.double else []
        lines += [f"    net.get_submodule({path!r}).eval()" for path in program.apart]
        lines += ["    return net", "", "", "def inputs():", f"    torch.manual_seed({program.seed + 1})"]
        return [*lines, f"    return ({', '.join(text for _, text in program.inputs)},)"]


def _used(body: Body) -> Iterator[int]:
    for stmt in body.stmts:
        yield from stmt.ins.values()
    yield from body.returns


def returned(body: Body, names: list[str]) -> str:
    """The expression that gives several values back."""
    if body.form == "one":
        return names[0]
    if body.form == "tuple":
        return f"({', '.join(names)},)"
    if body.form == "list":
        return f"[{', '.join(names)}]"
    if body.form == "nested":
        return f"{{'all': ({', '.join(names)},), 'n': 3}}"
    if body.form == "dict":
        return "{" + ", ".join(f"{key!r}: {name}" for key, name in zip(PART_NAMES["dict"], names, strict=False)) + "}"
    return f"{body.form}({', '.join(names)})"
