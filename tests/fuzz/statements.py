"""The statements that models are made of: each looks what is there and proposes one, or None where nothing fits."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fuzz.builder import Builder
from fuzz.program import (
    DROPOUT,
    INTEGER,
    LIST,
    NORM,
    PARAMETER,
    PRODUCT,
    RANDOM,
    UNKNOWN_VIEW,
    VIEW,
    WRITE,
    Node,
    Stmt,
)  # fmt: skip

Maker = Callable[[Builder], Stmt | None]
MAKERS: list[tuple[Maker, float, bool]] = []  # with their weights, and whether they write


def statement(weight: float, writes: bool = False) -> Callable[[Maker], Maker]:
    def register(maker: Maker) -> Maker:
        MAKERS.append((maker, weight, writes))
        return maker

    return register


def silent(*bases: str, reads: str = "") -> tuple[Node, ...]:
    """Operations on sizes and masks: they take names, and nobody selects them."""
    return tuple(Node(base, reads=reads, kinds=(INTEGER,)) for base in bases)


def last(size: int) -> Callable[[Tensor], bool]:
    return lambda t: t.dim() > 0 and t.shape[-1] == size


def dims(*counts: int) -> Callable[[Tensor], bool]:
    return lambda t: t.dim() in counts


# Pure functions of one value: (text, base, the operations on sizes and masks before it).
UNARY = [
    ("torch.relu({a})", "relu"), ("F.relu({a})", "relu"), ("{a}.relu()", "relu"), ("torch.tanh({a})", "tanh"), ("{a}.tanh()", "tanh"),
    ("torch.sigmoid({a})", "sigmoid"), ("F.gelu({a})", "gelu"), ("F.silu({a})", "silu"), ("F.leaky_relu({a}, 0.1)", "leaky_relu"),
    ("F.elu({a})", "elu"), ("F.softplus({a})", "softplus"), ("{a} * 0.5", "mul"), ("2.0 * {a}", "mul"), ("{a} + 1.0", "add"),
    ("1.0 - {a}", "sub"), ("-{a}", "neg"), ("{a} / 2.0", "truediv"), ("{a} ** 2", "pow"), ("torch.abs({a})", "abs"),
    ("{a}.square()", "square"), ("torch.sin({a})", "sin"), ("{a}.clamp(-1.0, 1.0)", "clamp"), ("F.softmax({a}, -1)", "softmax"),
    ("{a}.softmax(-1)", "softmax"), ("torch.mul({a}, 1.5)", "mul"), ("{a}.add(0.25)", "add"), ("F.hardtanh({a})", "hardtanh"),
    ("torch.clone({a})", "clone"), ("{a}.clone()", "clone"), ("{a}.cumsum(-1)", "cumsum"), ("torch.flip({a}, (0,))", "flip"),
]  # fmt: skip


@statement(14)
def unary(b: Builder) -> Stmt | None:
    a, (text, base) = b.pick(), b.rng.choice(UNARY)
    if a is None or (text.startswith("1.0 -") and a in b.factories()):  # of a tensor that is no value of the trace: rsub
        return None
    kinds = (VIEW,) if base == "flip" else ()  # the same numbers in another order
    return b.stmt(f"{{o}} = {text}", {"a": a}, Node(base, out="o", reads="a", kinds=kinds))


BINARY = [
    ("{a} + {b}", "add"), ("{a} - {b}", "sub"), ("{a} * {b}", "mul"), ("torch.add({a}, {b}, alpha=0.5)", "add"),
    ("{a}.add({b})", "add"), ("torch.maximum({a}, {b})", "maximum"), ("torch.lerp({a}, {b}, 0.3)", "lerp"), ("{a}.mul({b})", "mul"),
    ("torch.cat([{a}, {b}], -1)", "cat"), ("torch.stack([{a}, {b}])", "stack"), ("torch.cat(({a}, {b}))", "cat"),
]  # fmt: skip


@statement(9)
def binary(b: Builder) -> Stmt | None:
    a, (text, base) = b.pick(), b.rng.choice(BINARY)
    c = None if a is None else b.like(a)
    return None if a is None or c is None else b.stmt(f"{{o}} = {text}", {"a": a, "b": c}, Node(base, out="o", reads="ab"))


@statement(2)
def chosen(b: Builder) -> Stmt | None:
    a = b.pick()
    c = None if a is None else b.like(a)
    if a is None or c is None:
        return None
    if b.rng.random() < 0.5:
        nodes = (*silent("gt", reads="a"), Node("where", out="o", reads="0ab"))
        return b.stmt("{o} = torch.where({a} > 0, {a}, {b})", {"a": a, "b": c}, *nodes)
    nodes = (*silent("gt", reads="b"), Node("masked_fill", out="o", reads="a0"))
    return b.stmt("{o} = {a}.masked_fill({b} > 0, 0.5)", {"a": a, "b": c}, *nodes)


@statement(3)
def reduced(b: Builder) -> Stmt | None:
    a = b.pick(dims(2, 3, 4))
    text, base = b.rng.choice([
        ("{a}.mean(-1)", "mean"), ("{a}.sum(-1, keepdim=True)", "sum"), ("{a}.mean(1)", "mean"), ("torch.sum({a}, 0)", "sum"),
        ("{a}.amax(-1)", "amax"), ("{a}.mean(1, keepdim=True)", "mean"), ("torch.logsumexp({a}, -1)", "logsumexp"),
    ])  # fmt: skip
    return None if a is None else b.stmt(f"{{o}} = {text}", {"a": a}, Node(base, out="o", reads="a"))


@statement(1)
def largest(b: Builder) -> Stmt | None:
    a = b.pick(dims(2, 3))
    if a is None:
        return None
    port = Node("getitem", out="o", reads="0", port=(0, ("0",), False))
    if b.rng.random() < 0.5:
        return b.stmt("{o} = {a}.max(-1)[0]", {"a": a}, Node("max", reads="a", kinds=(LIST,)), port)
    other = Node("getitem", out="p", reads="0", kinds=(INTEGER,), port=(0, ("1",), False))
    return b.stmt("{o}, {p} = {a}.max(-1)", {"a": a}, Node("max", reads="a", kinds=(LIST,)), port, other, outs="op")


# Layers.


def layer(b: Builder, stem: str, made: str) -> tuple[str, tuple[str, ...]]:
    """A layer's attribute: a new one, or one that the body has, called once more."""
    line = f"{{S}}.{{name}} = {made}"
    there = [s.made[0] for s in b.body.stmts if s.made and s.made[0].partition(" = ")[2] == made]
    if there and b.rng.random() < 0.35:
        one = b.rng.choice(there)
        return one.partition(" = ")[0].removeprefix("{S}."), (one,)
    name = b.attr(stem)
    return name, (line.replace("{name}", name),)


def call(b: Builder, a: int, stem: str, made: str, *kinds: str, rate: float | None = None) -> Stmt:
    name, lines = layer(b, stem, made)
    node = Node("", out="o", reads="a", kinds=kinds, module=name, rate=rate)
    return b.stmt(f"{{o}} = {{S}}.{name}({{a}})", {"a": a}, node, made=lines)


@statement(16)
def linear(b: Builder) -> Stmt | None:
    a = b.pick(lambda t: t.dim() >= 1 and t.shape[-1] in (2, 4))
    if a is None:
        return None
    return call(b, a, "fc", f"nn.Linear({b.tensors[a].shape[-1]}, {b.rng.choice((4, 4, 4, 2))})", PRODUCT)


@statement(2)
def through_a_view(b: Builder) -> Stmt | None:
    """A product, a view of it, and a product that reads the view: what it reads is the first product."""
    a = b.pick(lambda t: t.dim() in (2, 3) and t.shape[-1] == 4)
    if a is None:
        return None
    one, other = b.attr("fc"), b.attr("fc")
    text, base = b.rng.choice((("{t}.reshape(-1, 4)", "reshape"), ("{t}.transpose(0, 1)", "transpose"), ("{t}.unsqueeze(0)", "unsqueeze")))
    lines = f"{{t}} = {{S}}.{one}({{a}})\n{{u}} = {text}\n{{o}} = {{S}}.{other}({{u}})"
    size = b.tensors[a].shape[0] if base == "transpose" and b.tensors[a].dim() == 2 else 4
    nodes = (
        Node("", out="t", reads="a", kinds=(PRODUCT,), module=one), Node(base, out="u", reads="t", kinds=(VIEW,), line=1),
        Node("", out="o", reads="u", kinds=(PRODUCT,), module=other, line=2),
    )  # fmt: skip
    return b.stmt(lines, {"a": a}, *nodes, outs="tuo", made=(f"{{S}}.{one} = nn.Linear(4, 4)", f"{{S}}.{other} = nn.Linear({size}, 4)"))


@statement(5)
def activation(b: Builder) -> Stmt | None:
    a = b.pick()
    return None if a is None else call(b, a, "act", b.rng.choice(("nn.ReLU()", "nn.Tanh()", "nn.GELU()", "nn.Sigmoid()", "nn.SiLU()")))


@statement(1.5, writes=True)
def activation_in_place(b: Builder) -> Stmt | None:
    a = b.pick()
    if a is None:
        return None
    stmt = call(b, a, "act", "nn.ReLU(inplace=True)", WRITE)
    return stmt


@statement(3)
def norm(b: Builder) -> Stmt | None:
    a = b.pick(lambda t: t.dim() >= 2 and t.shape[-1] == 4)
    if a is None:
        return None
    if b.tensors[a].dim() == 2 and b.rng.random() < 0.6:
        return call(b, a, "bn", "nn.BatchNorm1d(4)", NORM)
    if b.rng.random() < 0.5:
        return call(b, a, "ln", "nn.LayerNorm(4)", NORM)
    return b.stmt("{o} = F.layer_norm({a}, (4,))", {"a": a}, Node("layer_norm", out="o", reads="a", kinds=(NORM,)))


@statement(2)
def convolution(b: Builder) -> Stmt | None:
    a = b.pick(lambda t: t.dim() == 3 and t.shape[1] <= 4)
    if a is None:
        return None
    return call(b, a, "conv", f"nn.Conv1d({b.tensors[a].shape[1]}, {b.rng.choice((2, 3))}, 3, padding=1)", PRODUCT)


@statement(4)
def weighted(b: Builder) -> Stmt | None:
    """A product with a parameter, or an arithmetic one."""
    a = b.pick(last(4))
    if a is None:
        return None
    name = b.attr("w")
    own = Node(name, "parameter", kinds=(PARAMETER,))
    shape, text, base, kinds = b.rng.choice([
        ("4, 4", f"F.linear({{a}}, {{S}}.{name})", "linear", (PRODUCT,)), ("4, 2", f"{{a}} @ {{S}}.{name}", "matmul", (PRODUCT,)),
        ("4, 4", f"torch.matmul({{a}}, {{S}}.{name})", "matmul", (PRODUCT,)), ("4", f"{{a}} * {{S}}.{name}", "mul", ()),
        ("4", f"{{a}} + {{S}}.{name}", "add", ()), ("2, 4", f"torch.einsum('...i,oi->...o', {{a}}, {{S}}.{name})", "einsum", (PRODUCT,)),
    ])  # fmt: skip
    made = (f"{{S}}.{name} = nn.Parameter(torch.linspace(-1.0, 1.0, {_product(shape)}).view({shape}))",)
    return b.stmt(f"{{o}} = {text}", {"a": a}, own, Node(base, out="o", reads="a0", kinds=kinds), made=made)


def _product(shape: str) -> int:
    found = 1
    for each in shape.split(","):
        found *= int(each)
    return found


@statement(1)
def of_parameters(b: Builder) -> Stmt | None:
    """A value computed from a parameter alone, and read."""
    a = b.pick(last(4))
    if a is None:
        return None
    name = b.attr("w")
    made = (f"{{S}}.{name} = nn.Parameter(torch.linspace(-1.0, 1.0, 4))",)
    text = f"{{t}} = torch.sigmoid({{S}}.{name})\n{{o}} = {{a}} * {{t}}"
    own = Node(name, "parameter", kinds=(PARAMETER,))
    nodes = (own, Node("sigmoid", out="t", reads="0"), Node("mul", out="o", reads="at", line=1))
    return b.stmt(text, {"a": a}, *nodes, outs="ot", made=made)


@statement(3)
def own_dropout(b: Builder) -> Stmt | None:
    a, rate = b.pick(), b.rng.choice((0.2, 0.5))
    if a is None:
        return None
    if b.rng.random() < 0.5:
        return call(b, a, "drop", f"nn.Dropout({rate})", DROPOUT, RANDOM, rate=rate)
    if b.rng.random() < 0.2:
        kinds = (DROPOUT, RANDOM, WRITE) if b.writes else (DROPOUT, RANDOM)
        text = f"F.dropout({{a}}, {rate}, {{S}}.training{', inplace=True' * b.writes})"
        return b.stmt(f"{{o}} = {text}", {"a": a}, Node("dropout", out="o", reads="a", kinds=kinds, rate=rate))
    text = b.rng.choice((f"F.dropout({{a}}, {rate}, {{S}}.training)", f"F.dropout({{a}}, p={rate}, training={{S}}.training)"))
    return b.stmt(f"{{o}} = {text}", {"a": a}, Node("dropout", out="o", reads="a", kinds=(DROPOUT, RANDOM), rate=rate))


@statement(2.5)
def recurrent(b: Builder) -> Stmt | None:
    a = b.pick(lambda t: t.dim() == 3 and t.shape[-1] == 4)
    if a is None:
        return None
    kind = b.rng.choice(("LSTM", "GRU", "RNN"))
    name, made = layer(b, "rnn", f"nn.{kind}(4, 4, batch_first={b.rng.random() < 0.7})")
    run = Node("", reads="a", kinds=(PRODUCT, LIST), module=name)
    out = Node("getitem", out="o", reads="0", port=(0, ("out", "0"), True))
    form = b.rng.random()
    if form < 0.4 and kind == "LSTM":
        return b.stmt(f"{{o}}, _ = {{S}}.{name}({{a}})", {"a": a}, run, out, Node("getitem", kinds=(LIST,), reads="0"), made=made)
    if form < 0.6:
        return b.stmt(f"{{o}} = {{S}}.{name}({{a}})[0]", {"a": a}, run, out, made=made)
    if kind != "LSTM":
        state = Node("getitem", out="p", reads="0", port=(0, ("h_n", "1"), False))
        return b.stmt(f"{{o}}, {{p}} = {{S}}.{name}({{a}})", {"a": a}, run, out, state, outs="op", made=made)
    state = Node("getitem", reads="0", kinds=(LIST,))
    hidden = Node("getitem", out="p", reads="2", port=(0, ("h_n", "1.0"), False))
    cell = Node("getitem", out="q", reads="2", port=(0, ("c_n", "1.1"), False))
    return b.stmt(f"{{o}}, ({{p}}, {{q}}) = {{S}}.{name}({{a}})", {"a": a}, run, out, state, hidden, cell, outs="opq", made=made)


@statement(2)
def cells(b: Builder) -> Stmt | None:
    """A cell in a loop over time."""
    a = b.pick(lambda t: t.dim() == 3 and t.shape[-1] == 4 and 1 < t.shape[1] <= 4)
    if a is None:
        return None
    steps, batch = b.tensors[a].shape[1], b.tensors[a].shape[0]
    start = b.pick(lambda t: tuple(t.shape) == (batch, 4) and t.dtype == b.tensors[a].dtype)
    if start is None:
        return None
    name, made = layer(b, "cell", b.rng.choice(("nn.GRUCell(4, 4)", "nn.RNNCell(4, 4)")))
    plain = f"{{o}} = {{s}}\nfor t in range({steps}):\n    {{o}} = {{S}}.{name}({{a}}[:, t], {{o}})"
    lines, nodes, before = list[str](), list[Node](), "s"
    for t in range(steps):
        after = "o" if t == steps - 1 else "uvwxyz"[t]
        nodes.append(Node("getitem", out="mnkl"[t], reads="a", kinds=(VIEW,), line=2 * t))
        nodes.append(Node("", out=after, reads="mnkl"[t] + before, kinds=(PRODUCT,), module=name, line=2 * t + 1))
        lines += [f"{{{'mnkl'[t]}}} = {{a}}[:, {t}]", f"{{{after}}} = {{S}}.{name}({{{'mnkl'[t]}}}, {{{before}}})"]
        before = after
    return b.stmt(plain, {"a": a, "s": start}, *nodes, made=made, spelled="\n".join(lines))


@statement(1)
def embedding(b: Builder) -> Stmt | None:
    found = [at for at, t in b.tensors.items() if isinstance(t, Tensor) and t.dtype == torch.int64]
    # 64: no axis is longer of which an index is taken; a model that raises for an index, and does nothing with the row, is no case
    return call(b, b.rng.choice(found), "emb", "nn.Embedding(64, 4)", PRODUCT) if found else None


# Views. An unknown view is one of which the roles are not told here: whether a read of it is a read of what it views.
VIEWS: list[tuple[str, str, Callable[[Tensor], bool], tuple[str, ...]]] = [
    ("{a}.view(-1)", "view", dims(1, 2, 3), ()), ("{a}.flatten(1)", "flatten", dims(3, 4), ()),
    ("torch.flatten({a}, 1)", "flatten", dims(3, 4), ()), ("{a}.reshape(-1, 2)", "reshape", dims(2, 3), ()),
    ("{a}.transpose(0, 1)", "transpose", dims(2, 3, 4), ()), ("{a}.permute(1, 0)", "permute", dims(2), ()),
    ("{a}.permute(0, 2, 1)", "permute", dims(3), ()), ("{a}.t()", "t", dims(2), ()), ("{a}.unsqueeze(1)", "unsqueeze", dims(1, 2), ()),
    ("{a}[:, 0]", "getitem", dims(2, 3, 4), ()), ("{a}[..., :2]", "getitem", dims(1, 2, 3), ()), ("{a}[0]", "getitem", dims(2, 3), ()),
    ("{a}[:, None]", "getitem", dims(1, 2), ()), ("{a}[..., -1]", "getitem", dims(2, 3), ()), ("{a}[1:]", "getitem", dims(2, 3), ()),
    ("{a}.narrow(-1, 0, 2)", "narrow", dims(1, 2, 3), ()), ("{a}.select(1, 0)", "select", dims(2, 3), ()),
    ("{a}.squeeze(1)", "squeeze", dims(2, 3), ()), ("{a}.contiguous()", "contiguous", dims(1, 2, 3), ()),
    ("{a}.detach()", "detach", dims(1, 2, 3), ()), ("torch.swapaxes({a}, 0, 1)", "swapaxes", dims(2, 3), ()),
    ("{a}.movedim(0, -1)", "movedim", dims(2, 3), ()), ("{a}.unflatten(-1, (2, 2))", "unflatten", last(4), ()),
    ("{a}.view_as({a})", "view_as", dims(1, 2, 3), ()), ("{a}.expand(2, *{a_shape})", "expand", dims(1, 2), ()),
    ("{a}.to(torch.float32)", "to", dims(1, 2, 3), ()), ("{a}.float()", "float", dims(1, 2, 3), ()),
    ("{a}.double()", "double", dims(1, 2), ()),
    ("torch.atleast_2d({a})", "atleast_2d", dims(1, 2), ()), ("{a}.ravel()", "ravel", dims(2, 3), ()),
    # not in the tables of 0.1
    ("{a}.diagonal()", "diagonal", dims(2), (UNKNOWN_VIEW,)), ("{a}.unfold(-1, 2, 1)", "unfold", last(4), (UNKNOWN_VIEW,)),
    ("{a}.broadcast_to({a_full})", "broadcast_to", dims(1, 2, 3), (UNKNOWN_VIEW,)), ("+{a}", "pos", dims(1, 2, 3), (UNKNOWN_VIEW,)),
    ("torch.positive({a})", "positive", dims(1, 2, 3), (UNKNOWN_VIEW,)),
    ("torch.atleast_1d({a})", "atleast_1d", dims(1, 2), (UNKNOWN_VIEW,)),
    ("torch.einsum('ij->ji', {a})", "einsum", dims(2), (UNKNOWN_VIEW,)),
    ("{a}.as_strided((2, 2), (1, 1))", "as_strided", dims(1, 2), (UNKNOWN_VIEW,)),
    ("torch.real({a})", "real", dims(1, 2), (UNKNOWN_VIEW,)), ("{a}.type(torch.float32)", "type", dims(1, 2), (UNKNOWN_VIEW,)),
    ("{a}.cpu()", "cpu", dims(1, 2), (UNKNOWN_VIEW,)), ("torch.resolve_conj({a})", "resolve_conj", dims(1, 2), (UNKNOWN_VIEW,)),
    ("torch.broadcast_tensors({a}, {a})[0]", "broadcast_tensors", dims(1, 2), (UNKNOWN_VIEW, LIST)),
    ("torch.hsplit({a}, 2)[0]", "hsplit", lambda t: t.dim() >= 2 and t.shape[1] % 2 == 0, (UNKNOWN_VIEW, LIST)),
    ("torch.meshgrid({a}, {a}, indexing='ij')[0]", "meshgrid", dims(1), (UNKNOWN_VIEW, LIST)),
]  # fmt: skip


@statement(14)
def view(b: Builder) -> Stmt | None:
    text, base, test, kinds = b.rng.choice(VIEWS)
    a = b.pick(test)
    if a is None:
        return None
    shape = ", ".join(map(str, b.tensors[a].shape))
    text = text.replace("*{a_shape}", shape).replace("{a_full}", f"({shape},)")
    if LIST in kinds:
        index = int(text[-2])
        part = Node("getitem", out="o", reads="0", kinds=(UNKNOWN_VIEW,), port=(0, (str(index),), False))
        return b.stmt(f"{{o}} = {text}", {"a": a}, Node(base, reads="a", kinds=kinds), part)
    kinds = (*kinds, *(() if UNKNOWN_VIEW in kinds else (VIEW,)))
    if base == "einsum":
        kinds = (UNKNOWN_VIEW,)
    return b.stmt(f"{{o}} = {text}", {"a": a}, Node(base, out="o", reads="a", kinds=kinds))


@statement(2)
def parts(b: Builder) -> Stmt | None:
    forms = (("{a}.chunk(2, -1)", "chunk"), ("torch.split({a}, 2, -1)", "split"), ("torch.chunk({a}, 2, dim=-1)", "chunk"))
    text, base = b.rng.choice(forms)
    a = b.pick(last(4))
    if a is None:
        return None
    own = [Node("getitem", out=letter, reads="0", kinds=(VIEW,), port=(0, (str(i),), False)) for i, letter in enumerate("op")]
    return b.stmt(f"{{o}}, {{p}} = {text}", {"a": a}, Node(base, reads="a", kinds=(LIST, VIEW)), *own, outs="op")


@statement(2)
def sized(b: Builder) -> Stmt | None:
    """A shape read from the value itself."""
    a = b.pick(dims(2, 3))
    if a is None:
        return None
    if b.rng.random() < 0.5:
        nodes = (*silent("getattr", "getitem"), Node("view", out="o", reads="a", kinds=(VIEW,)))
        return b.stmt("{o} = {a}.view({a}.shape[0], -1)", {"a": a}, *nodes)
    nodes = (*silent("size"), Node("reshape", out="o", reads="a", kinds=(VIEW,)))
    return b.stmt("{o} = {a}.reshape(-1, {a}.size(-1))", {"a": a}, *nodes)


@statement(0.5)
def attribute(b: Builder) -> Stmt | None:
    """torch.fx makes a node of an attribute when it is first used."""
    a = b.pick(dims(2, 3))
    if a is None:
        return None
    spelled = "{t} = {a}.mT\n{o} = {t} + 0.5"
    nodes = (Node("getattr", out="t", reads="a", kinds=(VIEW,)), Node("add", out="o", reads="t", line=1))
    return b.stmt("{o} = {a}.mT + 0.5", {"a": a}, *nodes, spelled=spelled)


# Control flow.


@statement(1.5)
def by_mode(b: Builder) -> Stmt | None:
    a = b.pick()
    if a is None:
        return None
    one, other = b.rng.sample([("torch.relu({a})", "relu"), ("torch.tanh({a})", "tanh"), ("{a} * 2.0", "mul"), ("{a} + 0.5", "add")], 2)
    text = f"if {{S}}.training:\n    {{o}} = {one[0]}\nelse:\n    {{o}} = {other[0]}"
    return b.stmt(
        text, {"a": a}, Node(one[1], out="o", reads="a"), spelled=f"{{o}} = {one[0]}",
        eval_nodes=(Node(other[1], out="o", reads="a"),), eval_spelled=f"{{o}} = {other[0]}",
    )  # fmt: skip


@statement(1.5)
def by_dims(b: Builder) -> Stmt | None:
    """A branch on what a trace knows only by its example."""
    a = b.pick(dims(2, 3))
    if a is None or not b.sized:
        return None
    size = b.tensors[a].shape[0]
    text = f"if {{a}}.shape[0] == {size}:\n    {{o}} = {{a}} * 1.5\nelse:\n    {{o}} = {{a}}"
    return b.stmt(text, {"a": a}, *silent("getattr", "getitem", "eq"), Node("mul", out="o", reads="a"), spelled="{o} = {a} * 1.5")
