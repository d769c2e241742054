"""Calls whose arguments change kind: None for a tensor, one object twice, another dtype, ``True`` for ``1``, another order of keywords."""

from __future__ import annotations

import random

from fuzz.scenes import Fragment, drawn

HEAD = """\
class Mode(enum.Enum):
    ONE = 1
    TWO = 2
    UNO = 1


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


class Sub(torch.Tensor):
    pass


@dataclasses.dataclass
class Config:
    scale: object = 2.0
    mask: object = None


class Slots:
    __slots__ = ("scale",)

    def __init__(self, scale):
        self.scale = scale"""

# (parameters of the forward, lines of the forward, what a call gives): {n} is the fragment's number, "|" parts several parameters.
ARGUMENTS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("m{n}=None", "h = h if m{n} is None else h * m{n}", ("None", "A", "B", "2.0", "True", "torch.tensor(2.0)")),
    ("m{n}=None", "h = h * 0.5 if m{n} is None else h + m{n}", ("A", "None", "1", "A > 0")),
    (
        "m{n}=None",
        "if m{n} is not None:\n    h = h.masked_fill(m{n}, 0.0) if m{n}.dtype == torch.bool else h + m{n}",
        ("A > 0", "A", "None"),
    ),
    ("q{n}|k{n}", "h = h * (2.0 if q{n} is k{n} else 0.5) + q{n}", ("A|A", "A|B", "B|A", "B|B", "A|A.clone()", "A|A.view(3, 4)")),
    (
        "q{n}|k{n}|v{n}",
        "h = h + (q{n} * 2.0 if k{n} is v{n} else q{n}) + (0.0 if q{n} is k{n} else v{n})",
        ("A|A|A", "A|B|B", "A|B|C", "A|A|B"),
    ),
    ("q{n}|k{n}=None", "h = h + q{n} * (2.0 if k{n} is None or k{n} is x else 3.0)", ("A|None", "A|A", "A|B")),
    ("v{n}", "h = h + (v{n} if v{n}.dtype is torch.float64 else v{n} * 2.0).float()", ("A", "A.double()", "A.half()", "A.bfloat16()")),
    ("v{n}", "h = h + v{n}.to(torch.float32) * 2.0", ("A", "A.double()", "A.half()", "(A > 0)")),
    ("v{n}", "h = h * (2.0 if v{n}.is_floating_point() else 0.5) + v{n}", ("A", "A > 0", "A.long()", "A.double().float()")),
    ("v{n}", "h = h * (2.0 if isinstance(v{n}, nn.Parameter) else 0.5) + v{n}", ("A", "nn.Parameter(A)", "A")),
    ("v{n}", "h = h * (2.0 if type(v{n}) is torch.Tensor else 0.5) + v{n}", ("A", "nn.Parameter(A)", "A.as_subclass(Sub)")),
    ("v{n}", "h = h * (2.0 if isinstance(v{n}, Sub) else 0.5) + v{n}.as_subclass(torch.Tensor)", ("A", "A.as_subclass(Sub)")),
    ("v{n}", "h = h * (2.0 if v{n}.requires_grad else 0.5) + v{n}", ("A", "A.requires_grad_()", "A.clone().requires_grad_()")),
    ("v{n}", "h = h + (v{n} if v{n}.dim() == 2 else v{n}.sum(0))", ("A", "T(5, 2, 3, 4)", "T(5, 1, 3, 4)", "T(5, 4)")),
    ("v{n}", "h = h + v{n}.reshape(-1, 4)[:3] * float(v{n}.shape[0])", ("A", "T(5, 2, 3, 4)", "T(6, 5, 4)")),
    (
        "s{n}=1",
        "h = h * (3.0 if s{n} is True else 1.0) + s{n}",
        ("1", "True", "1.0", "0", "False", "torch.tensor(1.0)", "np.float64(1.0)", "Level.LOW"),
    ),
    ("s{n}=1.0", "h = h * s{n}", ("1.0", "2.0", "1", "True", "torch.tensor(2.0)", "np.float32(2.0)", "A", "float('nan')", "-0.0")),
    ("s{n}=2", "h = h * (2.0 if isinstance(s{n}, int) else 0.5) * s{n}", ("2", "2.0", "torch.tensor(2)", "True", "np.int64(2)")),
    ("s{n}=0.0", "h = h + math.copysign(1.0, s{n})", ("0.0", "-0.0", "0", "False")),
    (
        "s{n}=0.0",
        "h = h * (2.0 if s{n} else 0.5)",
        ("0.0", "1.0", "0", "None", "''", "'a'", "[]", "[0]", "torch.tensor(0.0)", "float('nan')"),
    ),
    ("s{n}", "h = h * (2.0 if s{n} is Mode.ONE else 0.5) * s{n}.value", ("Mode.ONE", "Mode.TWO", "Mode.UNO", "Level.LOW")),
    ("s{n}", "h = h * {{Mode.ONE: 2.0, Mode.TWO: 0.5}}.get(s{n}, 1.0)", ("Mode.ONE", "Mode.TWO", "1")),
    ("s{n}", "h = h * (2.0 if isinstance(s{n}, Level) else 0.5) * s{n}", ("Level.LOW", "1", "Level.HIGH", "2")),
    ("s{n}='mean'", "h = h - (h.mean() if s{n} == 'mean' else h.sum())", ("'mean'", "'sum'", "None", "b'mean'")),
    (
        "p{n}",
        "h = h + sum(1.0 if each is None else each for each in p{n})",
        ("(A, B)", "(A, None)", "(None, B)", "[A, B]", "(A,)", "(A, B, C)", "Pair(A, None)", "()"),
    ),
    ("p{n}", "h = h * (2.0 if isinstance(p{n}, list) else 0.5) + p{n}[0]", ("[A, B]", "(A, B)", "Pair(A, B)", "deque([A, B])")),
    ("p{n}", "h = h * (2.0 if hasattr(p{n}, 'one') else 0.5) + p{n}[1]", ("Pair(A, B)", "(A, B)")),
    ("p{n}", "a, b = p{n}\nh = h + a * b", ("(A, B)", "[A, B]", "(A, B, C)", "T(6, 2, 3, 4)", "T(6, 3, 3, 4)", "(A, 2.0)", "Pair(A, B)")),
    ("p{n}", "a, b = p{n}\nh = h + a * (b if b is not a else 2.0)", ("(A, A)", "(A, B)", "[B, B]", "(A, A.clone())")),
    ("p{n}", "h = h + p{n}[0] + (0.0 if p{n}[0] is x else p{n}[-1])", ("(A, B)", "(A, B, C)", "(A,)")),
    ("d{n}", "h = h + d{n}.get('k', 2.0)", ("{{}}", "{{'k': A}}", "{{'k': 2.0}}", "{{'j': A}}", "{{'j': A, 'k': C}}", "OrderedDict(k=A)")),
    (
        "d{n}",
        "h = h * (2.0 if 'k' in d{n} else 0.5) + len(d{n})",
        ("{{'k': A}}", "{{}}", "{{'j': A}}", "{{'k': None}}", "{{'k': A, 'j': B}}"),
    ),
    (
        "d{n}",
        "for key, each in d{n}.items():\n    h = h * 1.5 + each",
        ("{{'a': A, 'b': B}}", "{{'b': B, 'a': A}}", "{{'a': A}}", "{{'b': A, 'a': B}}", "{{'a': A, 'b': A}}"),
    ),
    (
        "d{n}",
        "h = h + (d{n}['k'] if d{n}['k'] is not None else 1.0)",
        ("{{'k': A}}", "{{'k': None}}", "{{'k': 3}}", "defaultdict(lambda: None)"),
    ),
    (
        "d{n}",
        "h = h + d{n}['a'][0]['b']",
        ("{{'a': [{{'b': A}}]}}", "{{'a': ({{'b': A}},)}}", "{{'a': [{{'b': 2.0}}]}}", "{{'a': [{{'b': A}}, None]}}"),
    ),
    (
        "d{n}",
        "match d{n}:\n    case {{'q': q}}:\n        h = h + q\n    case [a, b]:\n        h = h + a * b\n    case _:\n        h = h * 2.0",
        ("{{'q': A}}", "[A, B]", "A", "{{'k': A}}"),
    ),
    (
        "**more",
        "for key, each in more.items():\n    h = h * 1.5 + each",
        ("a=A, b=B", "b=B, a=A", "a=A", "", "a=B, b=A", "a=A, b=A", "a=A, c=B", "a=1.0, b=2.0"),
    ),
    ("**more", "h = h * (2.0 if list(more)[:1] == ['a'] else 0.5)", ("a=A, b=B", "b=B, a=A", "", "a=None")),
    (
        "f{n}",
        "h = f{n}(h)",
        (
            "torch.relu",
            "torch.tanh",
            "F.relu",
            "nn.Tanh()",
            "functools.partial(torch.mul, other=2.0)",
            "functools.partial(torch.mul, other=3.0)",
            "lambda t: t * 2.0",
            "torch.sigmoid",
        ),
    ),
    ("f{n}", "h = f{n}(h)", ("(lambda t, k=2.0: t * k)", "(lambda t, k=3.0: t * k)", "operator.neg", "copy.copy")),
    (
        "o{n}",
        "h = h * o{n}.scale",
        (
            "SimpleNamespace(scale=2.0)",
            "SimpleNamespace(scale=3.0)",
            "Config()",
            "Config(3.0)",
            "Slots(2.0)",
            "Slots(3.0)",
            "SimpleNamespace(scale=A)",
        ),
    ),
    (
        "o{n}",
        "h = h * (2.0 if o{n}.mask is None else o{n}.mask)",
        ("Config()", "Config(mask=A)", "Config(mask=B)", "SimpleNamespace(mask=None)", "Config(mask=3.0)"),
    ),
    (
        "i{n}",
        "h = h[:, i{n}].sum(1, keepdim=True) + h",
        ("slice(0, 2)", "slice(1, 3)", "slice(None)", "[0, 1]", "torch.tensor([0, 1])", "[1, 2, 3]"),
    ),
    ("i{n}", "h = h + h[i{n}]", ("0", "1", "-1", "torch.tensor(1)", "True", "np.int64(1)", "...", "None")),
    ("c{n}", "h = h.to(c{n}).float()", ("torch.float64", "torch.float16", "torch.int64", "torch.device('cpu')", "'cpu'")),
    (
        "c{n}",
        "h = h * sum(c{n})",
        ("range(3)", "[0, 1, 2]", "(1, 2)", "{{1, 2}}", "np.array([1.0, 2.0])", "(True, 2)", "[1.0, 2]", "frozenset({{1, 5}})"),
    ),
    (
        "a{n}",
        "h = h * torch.as_tensor(a{n}, dtype=torch.float32)",
        ("np.ones(4)", "np.full(4, 2.0)", "[1.0, 2.0, 3.0, 4.0]", "2.0", "np.float64(3.0)"),
    ),
    ("z{n}=1j", "h = h * abs(z{n}) + h * z{n}.imag", ("1j", "2j", "1.0", "complex(1, -0.0)")),
)
HEAVY = {0, 1, 3, 5, 15, 19, 24, 36}  # of these more


@drawn("kinds", 6.0)
def argument(rng: random.Random, n: int) -> Fragment:
    takes, text, calls = rng.choices(ARGUMENTS, [2.0 if i in HEAVY else 1.0 for i in range(len(ARGUMENTS))])[0]
    names = [each.format(n=n) for each in takes.split("|")]
    chosen = [call.format() for call in calls]
    if rng.random() < 0.5:
        rng.shuffle(chosen)
    if "**" in takes:
        given = chosen
    else:
        given = [", ".join(f"{name.partition('=')[0]}={value}" for name, value in zip(names, _parts(call), strict=True)) for call in chosen]
    if all("=" in name for name in names) and rng.random() < 0.3:
        given.append("")  # left out
    return Fragment(
        text.format(n=n), head=HEAD, takes=", ".join(name if "=" in name or "**" in name else f"{name}=None" for name in names), calls=given
    )


def _parts(call: str) -> list[str]:
    return call.split("|")


# What the input itself may be: another number of rows or dims, another dtype.
INPUTS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("b, c = x.shape\nh = h * float(c)", ("T(0, 3, 4)", "T(0, 2, 3, 4)", "T(0, 5, 4)")),
    ("*lead, c = x.shape\nh = h * float(len(lead))", ("T(0, 3, 4)", "T(0, 2, 3, 4)", "T(0, 5, 4)")),
    ("a, b, c = x\nh = h + a * c", ("T(0, 3, 4)", "T(0, 5, 4)", "T(0, 2, 4)")),
    ("a, b, *c = x\nh = h + a + float(len(c))", ("T(0, 3, 4)", "T(0, 5, 4)", "T(0, 4, 4)")),
    ("for row in x:\n    h = h * 1.5 + row.mean()", ("T(0, 3, 4)", "T(0, 5, 4)")),
    ("h = h + sum(row.mean() for row, _ in zip(x, range(4)))", ("T(0, 3, 4)", "T(0, 5, 4)", "T(0, 4, 4)")),
    ("h = h + sum(one.mean() * other.mean() for one, other in zip(x, h))", ("T(0, 3, 4)", "T(0, 5, 4)")),
    ("a, b, c = x.unbind()\nh = h + a * c", ("T(0, 3, 4)", "T(0, 4, 4)", "T(0, 5, 4)")),
    ("rows = x.unbind()\nh = h + rows[-1] * float(len(rows))", ("T(0, 3, 4)", "T(0, 5, 4)")),
    ("a, b = x.split(2)\nh = h + a[0] + b[-1]", ("T(0, 4, 4)", "T(0, 5, 4)", "T(0, 3, 4)")),
    ("h = h + [each.mean() for each in x.split(2)][-1]", ("T(0, 4, 4)", "T(0, 5, 4)", "T(0, 7, 4)")),
    ("h = h * float(len(x))", ("T(0, 3, 4)", "T(0, 5, 4)", "T(0, 2, 3, 4)")),
    ("h = h * float(len(list(x)))", ("T(0, 3, 4)", "T(0, 5, 4)")),
    ("h = h * (2.0 if x.dim() == 3 else 0.5)", ("T(0, 3, 4)", "T(0, 2, 3, 4)")),
    ("h = h * (2.0 if x.shape[0] > 4 else 0.5)", ("T(0, 3, 4)", "T(0, 5, 4)", "T(0, 4, 4)")),
    ("h = h + x[-1:1].sum()", ("T(0, 3, 4)", "T(0, 5, 4)")),
    ("h = h + x[[0, 1]].sum() + x[: x.shape[0] // 2].sum()", ("T(0, 4, 4)", "T(0, 6, 4)", "T(0, 5, 4)")),
    ("h = h + torch.arange(x.shape[0])[:3].unsqueeze(1)", ("T(0, 3, 4)", "T(0, 5, 4)")),
    ("h = h * (2.0 if x.requires_grad else 0.5)", ("T(0, 3, 4)", "T(0, 3, 4).requires_grad_()")),
    ("h = h * (2.0 if x.is_contiguous() else 0.5)", ("T(0, 3, 4)", "T(0, 4, 3).t()")),
    ("h = h * (2.0 if isinstance(x, nn.Parameter) else 0.5)", ("T(0, 3, 4)", "nn.Parameter(T(0, 3, 4))")),
    ("h = h * x.shape.numel() + x.numel()", ("T(0, 3, 4)", "T(0, 5, 4)")),
    ("h = h * float(str(x.shape[0]))", ("T(0, 3, 4)", "T(0, 5, 4)")),
)


@drawn("kinds", 3.0)
def input_changed(rng: random.Random, n: int) -> Fragment:
    text, xs = rng.choice(INPUTS)
    return Fragment(text, x=list(xs))
