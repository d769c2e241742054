"""A random program from a seed."""

from __future__ import annotations

import random
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fuzz.builder import Builder
from fuzz.program import DROPOUT, PART_NAMES, PRODUCT, RANDOM, WRITE, Body, Node, Plain, Program, Stmt
from fuzz.statements import MAKERS
from fuzz.writes import by_layout

ARGUMENTS = {
    "x": "torch.randn(3, 4)", "s": "torch.randn(3, 2, 4)", "y": "torch.randn(3, 4)", "z": "torch.randn(3, 2, 4)",
    "ids": "torch.randint(0, 6, (3, 2))",
}  # fmt: skip


LATER = 0.2  # how often a statement of a model that may write is followed by one that shows the layout of a value
WITHOUT: set[str] = set()  # statements that are left out, by the names of their makers


def generate(seed: int, mood: str = "") -> Program:
    """The program of a seed. ``mood``: ``"calm"`` for one that writes nothing, ``""`` for any."""
    rng = random.Random(seed)
    names = rng.choice([["x"], ["s"], ["x", "y"], ["s", "x"], ["s", "z"], ["ids"], ["x", "ids"]])
    variadic = rng.choice((1, 2)) if rng.random() < 0.05 else 0
    double, sized = rng.random() < 0.25, rng.random() < 0.75
    inputs = [(name, ARGUMENTS[name] + ".double()" * (double and name != "ids")) for name in names]
    inputs += [(f"rest{i}", ARGUMENTS["x"] + ".double()" * double) for i in range(variadic)]
    input_grads = rng.random() < 0.6
    program = Program(Body("Net"), inputs, variadic, double, input_grads=input_grads, seed=seed % 1000, number=seed)
    program.sized = sized or variadic > 0  # without one *rest cannot be followed
    torch.manual_seed(seed)
    given = [eval(text, {"torch": torch}) for _, text in inputs]
    given = [value.requires_grad_(input_grads and value.is_floating_point()) for value in given]
    build = Builder(program.root, given, rng, double, sized)
    build.later = random.Random(f"{seed} later")
    write = 0.0 if mood == "calm" else rng.choice((0.0, 0.0, 0.5, 1.0, 1.0, 2.0))
    _fill(build, rng.randint(3, 11), write, 2, [0])
    _finish(program, build, rng)
    return program


def _fill(build: Builder, count: int, write: float, depth: int, blocks: list[int]) -> None:
    build.writes = write > 0
    weights = [0.0 if maker.__name__ in WITHOUT else weight * (write if writes else 1.0) for maker, weight, writes in MAKERS]
    for _ in range(count):
        if depth and build.rng.random() < 0.12:
            _block(build, write, depth - 1, blocks)
            continue
        for _ in range(6):
            maker, _, writes = build.rng.choices(MAKERS, weights)[0]
            stmt = maker(build)
            if build.add(stmt, writes or (stmt is not None and any(node.is_a(WRITE) for node in stmt.nodes))):
                break
        if write and build.later.random() < LATER:
            _later(build)


def _later(build: Builder) -> None:
    """A statement that came to the generator later. It has draws of its own: models without one are those that their seeds always gave."""
    build.rng, rng = build.later, build.rng
    if by_layout.__name__ not in WITHOUT:
        build.add(by_layout(build), True)
    build.rng = rng


def _block(build: Builder, write: float, depth: int, blocks: list[int]) -> None:
    """A block, called once or twice; or a block that was called before, once more."""
    there = [s for s in build.body.stmts if s.calls is not None]
    if there and build.rng.random() < 0.4:
        again = build.rng.choice(there)
        shapes = [(build.tensors[at].shape, build.tensors[at].dtype) for at in again.ins.values()]
        chosen = [build.pick(partial(_is_like, shape=shape, dtype=dtype)) for shape, dtype in shapes]
        if None not in chosen:
            _call(build, again.calls, again.attr, chosen)  # type: ignore[arg-type]
        return
    given = [at for at in [build.pick() for _ in range(build.rng.choice((1, 1, 2)))] if at is not None]
    if not given:
        return
    blocks[0] += 1
    sequential = len(given) == 1 and build.rng.random() < 0.25
    body = Body(build.rng.choice(("Block", "Unit", "Head", "OwnNorm")) + str(blocks[0]) if not sequential else "Sequential")
    if body.name.startswith("OwnNorm"):
        body.name = f"Part{blocks[0]}Norm"
    body.sequential = sequential
    if sequential:
        _sequential(body, build, given[0])
    else:
        values = [build.tensors[at].detach().requires_grad_() for at in given]
        inner = Builder(body, [v.clone() for v in values], build.rng, build.double, build.sized)
        inner.later = build.later
        _fill(inner, build.rng.randint(1, 4), write, depth, blocks)
        live = [at for at in inner.live() if at not in inner.factories() and (at not in body.params or not body.stmts)]
        if not body.stmts or not live:
            return
        body.returns = list(dict.fromkeys([live[-1], *build.rng.sample(live, min(len(live), build.rng.choice((0, 0, 1))))]))[:2]
        body.form = "one" if len(body.returns) == 1 else build.rng.choice(("tuple", "tuple", "dict", "Pair"))
    if not body.stmts:
        return
    attr = build.attr({"Sequential": "seq"}.get(body.name, "blk"))
    _call(build, body, attr, given)


def _is_like(t: Tensor, shape: torch.Size, dtype: torch.dtype) -> bool:
    return t.shape == shape and t.dtype == dtype


def _sequential(body: Body, build: Builder, given: int) -> None:
    value = build.tensors[given].detach().requires_grad_().clone()
    size = value.shape[-1] if value.dim() else 0
    inner = Builder(body, [value], build.rng, build.double, build.sized)
    between = build.rng.choice(("nn.ReLU()", "nn.Tanh()", "nn.ReLU(inplace=True)"))
    layers = [f"nn.Linear({size}, 4)", between, "nn.Linear(4, 4)", "nn.Dropout(0.5)"]
    at = body.params[0]
    for i, made in enumerate(layers[: build.rng.randint(2, 4)]):
        kinds = (PRODUCT,) if "Linear" in made else (DROPOUT, RANDOM) if "Dropout" in made else (WRITE,) if "inplace" in made else ()
        node = Node("", out="o", reads="a", kinds=kinds, module=str(i), rate=0.5 if "Dropout" in made else None)
        stmt = inner.stmt(f"{{o}} = {{S}}.get_submodule('{i}')({{a}})", {"a": at}, node, made=(f"{{S}}.add_module('{i}', {made})",))
        if not inner.add(stmt, True):
            body.stmts.clear()
            return
        at = stmt.outs["o"]
    body.stmts = [_as_layer(s) for s in body.stmts]
    body.returns = [at]


def _as_layer(stmt: Stmt) -> Stmt:
    number = stmt.nodes[0].module
    made = stmt.made[0].partition(", ")[2].removesuffix(")")
    return Stmt(f"{{o}} = {{S}}[{number}]({{a}})", stmt.ins, stmt.nodes, stmt.outs, made=(f"{{S}}.{number} = {made}",))


def _call(build: Builder, body: Body, attr: str, given: list[int]) -> None:
    ins = dict(zip("abc", given, strict=False))
    outs = "opq"[: len(body.returns)]
    called = f"{{S}}.{attr}({', '.join(f'{{{letter}}}' for letter in ins)})"
    if body.form == "dict":
        keys = PART_NAMES["dict"]
        text = f"{{o}}_all = {called}\n" + "\n".join(f"{{{letter}}} = {{o}}_all['{keys[i]}']" for i, letter in enumerate(outs))
    else:
        text = f"{', '.join(f'{{{letter}}}' for letter in outs)} = {called}"
    stmt = build.stmt(text, ins, outs=outs, calls=body, attr=attr)
    if attr not in build.blocks:
        build.blocks[attr] = instance(body, build.double)
        build.home.add_module(attr, build.blocks[attr])
    build.add(stmt, True)


def instance(body: Body, double: bool) -> nn.Module:
    """A block as a module, to run its caller with."""
    program = Program(body, [(f"a{i}", "") for i in range(len(body.params))])
    space: dict[str, Any] = {}
    if body.sequential:
        exec(f"import torch\nfrom torch import Tensor, nn\nblock = {Plain(program)._construct(body)}", space)
        made: nn.Module = space["block"]
    else:
        exec(Plain(program).text().partition("def model():")[0], space)
        made = space[body.name]()
    return made.double() if double else made


def _finish(program: Program, build: Builder, rng: random.Random) -> None:
    """What is returned, and how; what is tied, frozen, set apart."""
    body = program.root
    live = list(dict.fromkeys(at for at in build.live(lambda t: t.dtype in build.plain_dtypes) if at not in body.params))
    if not live:
        live = [at for at in body.params if build.tensors[at].is_floating_point()] or [body.params[0]]
    latest = live[-1]
    read = {at for s in body.stmts for at in s.ins.values()}
    unread = [at for at in live if at not in read]
    more = [*rng.sample(unread, min(len(unread), rng.choice((0, 1, 2)))), *rng.sample(live, min(len(live), rng.choice((0, 0, 1))))]
    body.returns = list(dict.fromkeys([latest, *more]))[:3]
    two = len(body.returns) == 2
    body.form = "one" if len(body.returns) == 1 and rng.random() < 0.8 else rng.choice(
        ("tuple", "list", "dict", "nested", *(("Pair", "Both") if two else ()))
    )  # fmt: skip
    lines = [line for s in body.stmts for line in s.made]
    linears = [line.partition(" = ") for line in dict.fromkeys(lines) if " = nn.Linear(4, 4)" in line]
    if len(linears) >= 2 and rng.random() < 0.7:
        one, other = rng.sample([name.removeprefix("{S}.") for name, _, _ in linears], 2)
        program.ties = ((f"{one}.weight", f"{other}.weight"),)
    if linears and rng.random() < 0.08:
        program.frozen = (f"{linears[0][0].removeprefix('{S}.')}.weight",)
    apart = [s.attr for s in body.stmts if s.calls is not None]
    if apart and rng.random() < 0.15:
        program.apart = (rng.choice(apart),)
