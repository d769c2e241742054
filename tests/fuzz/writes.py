"""Statements that write: in place, through views, into what a factory made, into buffers."""

from __future__ import annotations

import functools

import torch

import graphreg
from fuzz.builder import Builder
from fuzz.program import CONSTANT, INTEGER, UNKNOWN_VIEW, VIEW, WRITE, Node, Stmt
from fuzz.statements import dims, last, silent, statement


@statement(6, writes=True)
def augmented(b: Builder) -> Stmt | None:
    """``v += w``: the variable has another value from then on."""
    a = b.pick()
    if a is None:
        return None
    text, base, two = b.rng.choice([
        ("{a} += {b}", "add", True), ("{a} -= {b}", "sub", True), ("{a} *= 0.5", "mul", False), ("{a} += 1.0", "add", False),
        ("{a} /= 2.0", "truediv", False), ("{a} *= {b}", "mul", True),
    ])  # fmt: skip
    c = b.like(a) if two else a
    if c is None or (two and c == a) or a in b.factories():
        return None
    ins = {"a": a, "b": c} if two else {"a": a}
    return b.stmt(text, ins, Node(base, out="o", reads="".join(ins), kinds=(WRITE,)), same={"o": "a"})


METHODS = [
    ("{a}.index_fill_(0, torch.tensor([0]), 0.5)", "index_fill_"), ("{a}.index_copy_(0, torch.tensor([0]), {b}[:1])", "index_copy_"),
    ("{a}.scatter_(0, torch.zeros({ones}, dtype=torch.int64), 0.5)", "scatter_"), ("{a}.exp_().clamp_(0.0, 2.0)", ""),
    ("{a}.add_({b})", "add_"), ("{a}.mul_(0.5)", "mul_"), ("{a}.mul_({b})", "mul_"), ("{a}.sub_({b}, alpha=0.5)", "sub_"),
    ("{a}.relu_()", "relu_"), ("torch.relu_({a})", "relu_"), ("{a}.clamp_(-1.0, 1.0)", "clamp_"), ("{a}.copy_({b})", "copy_"),
    ("{a}.fill_(0.25)", "fill_"), ("{a}.neg_()", "neg_"), ("{a}.tanh_()", "tanh_"), ("{a}.add_(1.0)", "add_"), ("{a}.div_(2.0)", "div_"),
]  # fmt: skip


@statement(6, writes=True)
def method(b: Builder) -> Stmt | None:
    """``v.add_(w)``, whose result has a name of its own, or none."""
    a, (text, base) = b.pick(), b.rng.choice(METHODS)
    c = None if a is None else b.like(a)
    if a is None or c is None or ("{b}" in text and a == c):
        return None
    ins = {"a": a, "b": c} if "{b}" in text else {"a": a}
    if not base:  # one write behind the other
        spelled = "{t} = {a}.exp_()\n{o} = {t}.clamp_(0.0, 2.0)"
        chain = (Node("exp_", out="t", reads="a", kinds=(WRITE,)), Node("clamp_", out="o", reads="t", kinds=(WRITE,), line=1))
        return b.stmt(f"{{o}} = {text}", ins, *chain, spelled=spelled, drops_out=("o",))
    if "{b}[:1]" in text:
        spelled = f"{{u}} = {{b}}[:1]\n{{o}} = {text.replace('{b}[:1]', '{u}')}"
        part = (Node("getitem", out="u", reads="b", kinds=(VIEW,)), Node(base, out="o", reads="au", kinds=(WRITE,), line=1))
        return b.stmt(f"{{o}} = {text}", ins, *part, spelled=spelled, drops_out=("o",))
    text = text.replace("{ones}", ", ".join("1" * b.tensors[a].dim()))
    return b.stmt(f"{{o}} = {text}", ins, Node(base, out="o", reads="".join(ins), kinds=(WRITE,)), drops_out=("o",))


@statement(3, writes=True)
def aside(b: Builder) -> Stmt | None:
    """A view, and a write into what it views: the view is read after it was written by another name."""
    a = b.pick(dims(2, 3))
    if a is None or a in b.factories():
        return None
    forms = (
        ("{a}.transpose(0, 1)", "transpose"),
        ("{a}[:, 0]", "getitem"),
        ("{a}.unsqueeze(0)", "unsqueeze"),
        ("{a}.flatten(1)", "flatten"),
    )
    write, wrote = b.rng.choice((("{a}.mul_(0.5)", "mul_"), ("{a}.add_(1.0)", "add_"), ("{a}.clamp_(-1.0, 1.0)", "clamp_")))
    text, base = b.rng.choice(forms)
    nodes = (Node(base, out="o", reads="a", kinds=(VIEW,)), Node(wrote, out="p", reads="a", kinds=(WRITE,), line=1))
    return b.stmt(f"{{o}} = {text}\n{{p}} = {write}", {"a": a}, *nodes, outs="op")


PARTS = [
    ("{a}[..., :2]", "getitem"), ("{a}[..., -1]", "getitem"), ("{a}[:, 0]", "getitem"), ("{a}.narrow(-1, 1, 2)", "narrow"),
    ("{a}[:, 1:]", "getitem"), ("{a}.transpose(0, 1)", "transpose"),
]  # fmt: skip


def by_layout(b: Builder) -> Stmt | None:
    """A part of a value, what its strides make a copy of it or a view, and a write into that: the part shows which it was."""
    # not of ``as_strided``, of which the oracle does not know what it is a view of
    a = b.pick(lambda t: t.dim() in (2, 3) and t.stride() != (1, 1))
    if a is None or a in b.factories():
        return None
    part, base = b.rng.choice(PARTS)
    again, name = b.rng.choice((
        ("{o}.contiguous()", "contiguous"), ("{o}.reshape(-1)", "reshape"), ("{o}.ravel()", "ravel"), ("torch.flatten({o})", "flatten"),
    ))  # fmt: skip
    write, wrote = b.rng.choice((("{p}.mul_(0.5)", "mul_"), ("{p}.add_(1.0)", "add_"), ("{p}.clamp_(-0.2, 0.2)", "clamp_")))
    nodes = (
        Node(base, out="o", reads="a", kinds=(VIEW,)), Node(name, out="p", reads="o", kinds=(VIEW,), line=1),
        Node(wrote, out="q", reads="p", kinds=(WRITE,), line=2), Node("sum", out="s", reads="o", line=3),
        Node("mul", out="r", reads="qs", line=4),
    )  # fmt: skip
    text = f"{{o}} = {part}\n{{p}} = {again}\n{{q}} = {write}\n{{s}} = {{o}}.sum()\n{{r}} = {{q}} * {{s}}"
    return b.stmt(text, {"a": a}, *nodes, outs="opqsr", hides="apqs")  # a splice is refused where what shares its storage is read later


@statement(1, writes=True)
def relu_in_place(b: Builder) -> Stmt | None:
    a = b.pick()
    stmt = "{o} = F.relu({a}, inplace=True)"
    return None if a is None else b.stmt(stmt, {"a": a}, Node("relu", out="o", reads="a", kinds=(WRITE,)), drops_out=("o",))


@statement(1, writes=True)
def masked(b: Builder) -> Stmt | None:
    a = b.pick()
    nodes = (*silent("lt", reads="a"), Node("masked_fill_", out="o", reads="a0", kinds=(WRITE,)))
    return None if a is None else b.stmt("{o} = {a}.masked_fill_({a} < 0, 0.0)", {"a": a}, *nodes, drops_out=("o",))


@statement(4, writes=True)
def assigned(b: Builder) -> Stmt | None:
    """``v[:, 0] = w``: no value, a write."""
    a = b.pick(dims(2, 3))
    if a is None:
        return None
    shape = b.tensors[a].shape
    dtype = b.tensors[a].dtype
    places = [(":, 0", (shape[0], *shape[2:])), ("0", tuple(shape[1:])), ("..., -1", tuple(shape[:-1])), ("...", tuple(shape))]
    where, wanted = b.rng.choice(places)
    c = b.pick(lambda t: tuple(t.shape) == wanted and t.dtype == dtype)
    if c is None or c == a or b.rng.random() < 0.25:
        return b.stmt(f"{{a}}[{where}] = 0.5", {"a": a}, Node("", reads="a", kinds=(WRITE, CONSTANT)), outs="")
    return b.stmt(f"{{a}}[{where}] = {{b}}", {"a": a, "b": c}, Node("", reads="ab", kinds=(WRITE, CONSTANT)), outs="")


@statement(2, writes=True)
def part_augmented(b: Builder) -> Stmt | None:
    """``v[..., :2] *= 2``: a view, a write into it, and its assignment."""
    a = b.pick(dims(1, 2, 3))
    if a is None or a in b.factories():
        return None
    where = b.rng.choice(("..., :2", "0", "..., -1"))
    text, base = b.rng.choice((("*= 2.0", "mul"), ("+= 1.0", "add")))
    nodes = (
        Node("getitem", out="t", reads="a", kinds=(VIEW,)),
        Node(base, out="u", reads="t", kinds=(WRITE,), line=1),
        Node("", reads="au", kinds=(WRITE, CONSTANT), line=2),
    )
    spelled = f"{{t}} = {{a}}[{where}]\n{{t}} {text}\n{{a}}[{where}] = {{t}}"
    return b.stmt(f"{{a}}[{where}] {text}", {"a": a}, *nodes, outs="", spelled=spelled, same={"u": "t"})


@statement(1, writes=True)
def out_given(b: Builder) -> Stmt | None:
    a = b.pick(lambda t: not t.requires_grad)
    c = None if a is None else b.like(a)
    if a is None or c is None or b.tensors[c].requires_grad:
        return None
    node = Node("mul", out="o", reads="ba", kinds=(WRITE,), into=1)
    return b.stmt("{o} = torch.mul({b}, 2.0, out={a})", {"a": a, "b": c}, node, drops_out=("o",))


@statement(1, writes=True)
def foreach(b: Builder) -> Stmt | None:
    a = b.pick()
    node = Node("_foreach_mul_", reads="a", kinds=(WRITE, INTEGER))
    return None if a is None else b.stmt("torch._foreach_mul_([{a}], 0.5)", {"a": a}, node, outs="")


@statement(1, writes=True)
def reshaped_in_place(b: Builder) -> Stmt | None:
    a = b.pick(dims(2))
    text, base = b.rng.choice((("{a}.unsqueeze_(1)", "unsqueeze_"), ("{a}.t_()", "t_"), ("{a}.squeeze_()", "squeeze_")))
    if a is None:
        return None
    return b.stmt(f"{{o}} = {text}", {"a": a}, Node(base, out="o", reads="a", kinds=(WRITE, UNKNOWN_VIEW if base == "t_" else VIEW)))


# Factories: (text, base where an argument is a value of the trace, which then is a site). All are written into.


@statement(7, writes=True)
def written_factory(b: Builder) -> Stmt | None:
    c = b.pick(dims(1, 2, 3))
    if c is None:
        return None
    shape, text = b.tensors[c].shape, ", ".join(map(str, b.tensors[c].shape))
    double = ", dtype=torch.float64" if str(b.tensors[c].dtype) == "torch.float64" else ""
    if b.tensors[c].dtype not in (b.plain_dtypes):
        return None
    constant = [f"torch.zeros({text}{double})", f"torch.ones({text}{double})", f"torch.full(({text},), 0.5{double})"]
    if len(shape) == 1:
        constant += [f"torch.arange({shape[0]}{double or ', dtype=torch.float32'})", f"torch.linspace(0.0, 1.0, {shape[0]}{double})"]
    if len(shape) == 2 and shape[0] == shape[1]:
        constant += [f"torch.eye({shape[0]}{double})"]
    made = [
        ("torch.zeros_like({b})", "zeros_like"), (f"{{b}}.new_zeros({text})", "new_zeros"), ("torch.ones_like({b})", "ones_like"),
        (f"{{b}}.new_full(({text},), 0.5)", "new_full"),
    ]  # fmt: skip
    write, base, same = b.rng.choice(_WRITES[:6] + (_WRITES[6:] if len(shape) > 1 else []))
    if b.rng.random() < 0.6:
        first, node = b.rng.choice(constant), Node("", out="t", kinds=(CONSTANT,))
    else:
        first, name = b.rng.choice(made)
        node = Node(name, out="t", reads="b")
    lines = f"{{t}} = {first}\n{write}"
    reads, line = "tb", 1
    part: tuple[Node, ...] = ()
    spelled = lines
    if "{b}[" in write:  # a value of its own: a part of what is written
        where = write.partition("{b}")[2].rstrip(")")
        spelled = f"{{t}} = {first}\n{{u}} = {{b}}{where}\n{write.replace('{b}' + where, '{u}')}"
        reads, part, line = "tu", (Node("getitem", out="u", reads="b", kinds=(VIEW,), line=1),), 2
    if not base:  # an assignment, after which the variable is read
        end = (Node("", reads=reads, kinds=(WRITE, CONSTANT), line=line), Node("add", out="o", reads="tb", line=line + 1))
        nodes: tuple[Node, ...] = (node, *part, *end)
        last_line = "\n{o} = {t} + {b}"
        return b.stmt(lines + last_line, {"b": c}, *nodes, outs="to", spelled=spelled + last_line, kind="factory")
    base = augmented_name() if base == "add" and node.is_a(CONSTANT) else base
    nodes = (node, *part, Node(base, out="o", reads=reads, kinds=(WRITE,), line=line))
    return b.stmt(lines, {"b": c}, *nodes, outs="to", spelled=spelled, kind="factory", same={"o": "t"} if same else {})


@functools.cache
def augmented_name() -> str:
    """What ``t = torch.zeros(...); t += x`` is called by: ``add``, as where t is a value of the trace, or ``add_``."""
    names = [site.name for site in graphreg.trace(_Augmented(), front_end="symbolic").values]
    return "add_" if "add_" in names else "add"


class _Augmented(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        t = torch.zeros(3)
        t += x
        return t * 2 + x


_WRITES = [
    ("{t} += {b}", "add", True), ("{o} = {t}.copy_({b})", "copy_", False), ("{o} = {t}.mul_({b})", "mul_", False),
    ("{o} = {t}.add_({b}, alpha=0.5)", "add_", False), ("{o} = {t}.index_add_(0, torch.tensor([0]), {b}[:1])", "index_add_", False),
    ("{t}[...] = {b}", "", False), ("{t}[:, 0] = {b}[:, 0]", "", False), ("{t}[1:] = {b}[1:]", "", False),
]  # fmt: skip


# Buffers.


@statement(3, writes=True)
def buffer(b: Builder) -> Stmt | None:
    a = b.pick(last(4))
    if a is None:
        return None
    name = b.attr("buf")
    made = (f"{{S}}.register_buffer('{name}', torch.linspace(0.0, 1.0, 4))",)
    read = Node("add", out="o", reads="a")
    if b.rng.random() < 0.35:
        return b.stmt(f"{{o}} = {{a}} + {{S}}.{name}", {"a": a}, read, made=made)
    if b.rng.random() < 0.5:
        text = f"{{S}}.{name}.mul_(0.5)\n{{o}} = {{a}} + {{S}}.{name}"
        return b.stmt(text, {"a": a}, Node("add", out="o", reads="a", line=1), made=made)
    if b.tensors[a].dim() != 2:
        return None
    text = f"{{S}}.{name}.mul_(0.5).add_({{a}}.detach().mean(0), alpha=0.1)\n{{o}} = {{a}} + {{S}}.{name}"
    spelled = f"{{t}} = {{a}}.detach()\n{{u}} = {{t}}.mean(0)\n{{w}} = {{S}}.{name}.mul_(0.5).add_({{u}}, alpha=0.1)\n"
    spelled += f"{{o}} = {{a}} + {{S}}.{name}"
    nodes = (
        Node("detach", out="t", reads="a", kinds=(VIEW,)), Node("mean", out="u", reads="t", line=1),
        Node("add_", out="w", reads="u", line=2, kinds=(WRITE,), into=None), Node("add", out="o", reads="a", line=3),
    )  # fmt: skip
    return b.stmt(text, {"a": a}, *nodes, made=made, spelled=spelled)


@statement(1, writes=True)
def plain_tensor(b: Builder) -> Stmt | None:
    """A tensor attribute that is no buffer, read and maybe updated."""
    a = b.pick(lambda t: t.dim() >= 1 and t.shape[-1] == 4 and t.dtype in b.plain_dtypes and not b.double)
    if a is None:
        return None
    name = b.attr("plain")
    made = (f"{{S}}.{name} = torch.ones(4)",)
    if b.rng.random() < 0.5:
        return b.stmt(f"{{o}} = {{a}} * {{S}}.{name}", {"a": a}, Node("mul", out="o", reads="a"), made=made, kind="plain")
    text = f"{{S}}.{name}.add_(1.0)\n{{o}} = {{a}} * {{S}}.{name}"
    return b.stmt(text, {"a": a}, Node("mul", out="o", reads="a", line=1), made=made, kind="plain")
