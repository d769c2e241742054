"""Scenes: models that ask, calls whose arguments change their kind, models that change between calls.

A scene is a model of a few fragments and a few calls of it. Its oracle is the model itself, unregularized: a regularized model of which
all splices have strength 0 must give the same in every call, or refuse the call by a GraphRegError. Of a fragment, ``h`` [3, 4] goes in
and comes out.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

KINDS = ("asks", "kinds", "changes")
WAYS = ("example", "no example", "in place")
SPLICES = ("BernoulliDropout('*', 0.0)", "GaussianNoise('*', 0.0)")
PENALTY, STRENGTH = "WeightL2('*', 0.3)", 0.3


@dataclass
class Fragment:
    """A part of a model, as text.

    ``text``: lines of the forward; ``made``: of ``__init__``; ``methods``: of the class; ``head``: above the class. ``takes``: parameters
    of the forward, with the keyword arguments of a call in ``calls``, the first as the model is traced. ``x``: what the input may be
    instead of ``T(0, 3, 4)``. ``changes``: what may be done with ``net`` between calls. ``watched``: attributes that the forward assigns.
    """

    text: str
    made: str = ""
    methods: str = ""
    head: str = ""
    takes: str = ""
    calls: list[str] = field(default_factory=list)
    x: list[str] = field(default_factory=list)
    changes: list[str] = field(default_factory=list)
    watched: list[str] = field(default_factory=list)


@dataclass
class Step:
    """A call: what is done with the model before, what the call is given, in which mode."""

    change: str
    given: str
    mode: str = "train"


@dataclass
class Scene:
    """``kind``: asks, kinds or changes; ``way``: how it is regularized; ``regs``: with what; ``number``: of the seed."""

    number: int
    kind: str
    fragments: list[Fragment]
    steps: list[Step]
    way: str
    front_end: str
    regs: list[str]
    penalties: str = "return"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Scene:
        fragments, steps = [Fragment(**each) for each in data["fragments"]], [Step(**each) for each in data["steps"]]
        return cls(**{**data, "fragments": fragments, "steps": steps})

    @property
    def weighs(self) -> bool:
        return PENALTY in self.regs

    def source(self) -> str:
        """The model, its changes and its calls as Python."""
        heads = "\n".join(dict.fromkeys(each.head for each in self.fragments if each.head))
        takes = ", ".join(["self", "x", *sorted((each.takes for each in self.fragments if each.takes), key=lambda text: "**" in text)])
        made = _indented([each.made for each in self.fragments], 8)
        body = _indented([each.text for each in self.fragments], 8)
        methods = _indented([f"\n{each.methods}" for each in self.fragments if each.methods], 4)
        calls = "\n".join(
            f"\n\ndef change_{i}(net):\n{_indented([step.change or 'pass'], 4)}\n\n"
            f"def call_{i}():\n    A, B, C = T(1, 3, 4), T(2, 3, 4), T(3, 3, 4)\n    return {step.given}"
            for i, step in enumerate(self.steps)
        )
        return _SOURCE.format(heads=heads, made=made, takes=takes, body=body, methods=methods, number=self.number % 1000, calls=calls)


_SOURCE = """\
import argparse, collections, collections.abc, copy, dataclasses, enum, functools, inspect, math, numbers, operator, types
from collections import Counter, OrderedDict, defaultdict, deque
from types import MethodType, SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune


def T(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Pair(NamedTuple):
    one: object
    other: object


{heads}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.last = nn.Linear(4, 4)
{made}

    def forward({takes}):
        h = torch.relu(self.first(x))
        h = h.reshape(-1, h.shape[-1])[:3]
{body}
        return self.last(h)
{methods}


def model():
    torch.manual_seed({number})
    return Net()
{calls}
"""


def _indented(texts: Sequence[str], depth: int) -> str:
    return "\n".join(" " * depth + line if line else "" for text in texts for line in text.split("\n") if text)


Draw = Callable[[random.Random, int], Fragment]
TABLES: dict[str, list[tuple[Draw, float]]] = {kind: [] for kind in KINDS}


def drawn(kind: str, weight: float = 1.0) -> Callable[[Draw], Draw]:
    """Register what draws a fragment of a kind: a function of random numbers and of the fragment's number."""

    def register(draw: Draw) -> Draw:
        TABLES[kind].append((draw, weight))
        return draw

    return register


def scene(seed: int, kind: str) -> Scene:
    """The scene of a seed."""
    rng = random.Random(f"{seed} {kind}")
    draws, weights = zip(*TABLES[kind], strict=True)
    fragments = [rng.choices(draws, weights)[0](rng, n) for n in range(rng.choice((1, 1, 2, 3)))]
    variadic = [each for each in fragments if "**" in each.takes]
    fragments = [each for each in fragments if each not in variadic[1:]]
    if kind == "changes":
        ties = all(".weight = " in change or "assign=True" in change for each in fragments for change in each.changes)
        way = rng.choice(WAYS) if ties else "in place"  # one graph is all that a module of ``regularize`` has
    else:
        way = rng.choice(WAYS)
    regs = [text for text in SPLICES if rng.random() < 0.4]
    if rng.random() < (0.8 if kind == "changes" else 0.2) or not regs:
        regs.append(PENALTY)
    made = Scene(seed, kind, fragments, [], way, rng.choice(("auto", "auto", "symbolic")), regs)
    made.penalties = rng.choice(("return", "attach"))
    made.steps = _steps(made, rng)
    return made


def _steps(scene: Scene, rng: random.Random) -> list[Step]:
    chosen = [(each.calls or [""])[0] for each in scene.fragments]
    x = "T(0, 3, 4)"
    modes = ["train"] * 5 if rng.random() < 0.7 else ["train", "eval", "train", "train", "eval"]
    steps = [Step("", _given(x, chosen), modes[0])]
    for i in range(1, rng.choice((2, 3, 4))):
        at, change = rng.randrange(len(scene.fragments)), ""
        fragment = scene.fragments[at]
        if fragment.x and rng.random() < 0.5:
            x = rng.choice(fragment.x)
        elif len(fragment.calls) > 1:
            chosen[at] = rng.choice(fragment.calls)
        elif fragment.changes:
            change = rng.choice(fragment.changes)
        elif scene.kind == "asks":
            x = f"T({i}, 3, 4)"
        steps.append(Step(change, _given(x, chosen), modes[i]))
    return steps


def _given(x: str, chosen: Sequence[str]) -> str:
    return f"dict({', '.join([f'x={x}', *(text for text in chosen if text)])})"
