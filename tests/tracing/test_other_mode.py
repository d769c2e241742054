"""The second mode is followed along the graph of the first where that gives what a trace would, and traced where it may not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphreg
from graphreg.tracing.symbolic import other_mode, symbolic
from own_modes import assert_both_modes_are_the_models

X = torch.randn(3, 4)


class Layers(nn.Module):
    """Layers whose dropout has the mode as a literal."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(4, 4), nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.dropout(self.a(x).relu(), 0.5, self.training))


class Nested(Layers):
    """Blocks, whose outputs have names of their own; a parameter and a buffer that functions read."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Layers() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = F.linear(block(x), self.a.weight, self.a.bias) + self.calls
        return F.dropout(self.norm(x), p=0.5, training=self.training) * (0.5 if self.training else 0.25)


class Unpacked(Layers):
    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        left, right = F.dropout(self.a(x), 0.5, self.training).chunk(2, 1)
        left = left.clone()
        left[:, 0] = 1.0
        return torch.cat([right, left], 1), {"left": left}


class Branches(Layers):
    """The structure depends on the mode."""

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu() if self.training else self.a(x))


class OtherOrder(Layers):
    """The same operations, on other values."""

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.a(x), self.b(x)
        return a - b if self.training else b - a


class Longer(Layers):
    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return x if self.training else self.b(x)


class Shorter(Layers):
    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.b(x) if self.training else x


class OtherLayer(Layers):
    def forward(self, x: Tensor) -> Tensor:
        return (self.a if self.training else self.b)(x)


class Makes(Layers):
    """It makes a tensor, in eval mode alone."""

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) * (torch.ones(4) if not self.training else 1.0)


class MakesBoth(Layers):
    """It makes a tensor and writes into it, so that the graph makes it at each call."""

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros(4)
        h += F.dropout(self.a(x), 0.5, self.training).sum(0)
        return h


class Counts(Layers):
    """It keeps, in eval mode, something that its next call does not read."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(self.a(x), 0.5, self.training)
        if not self.training:
            self.seen = 3
        return x


class AsksForTypes(Layers):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.a(x) if isinstance(x, Tensor) else x[0], 0.5, self.training)


class Swallows(Layers):
    """A forward that catches everything, so that an end of the trace does not reach the tracer's caller."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(self.a(x), 0.5, self.training)
        try:
            x = x + (torch.ones(4) if not self.training else 1)
        except BaseException:
            x = x + 1
        return x


class OfAnother(Layers):
    """The mode of another module decides: the graph asserts or reads it, which takes further traces."""

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.a(x), 0.5, self.norm.training)


class Deciding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) if x.sum() > 0 else x


class WithOpaque(Layers):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Deciding()

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.inner(x), 0.5, self.training)


class Shift(torch.autograd.Function):
    """A function with a derivative of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x + 1

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0]


class Asks(Layers):
    """It asks for sizes, a type and a dtype's bounds, and calls a function of its own."""

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = x.shape
        x = F.dropout(self.a(x), 0.5, self.training)
        if columns > 2 and isinstance(x, Tensor):
            x = x.clamp(min=torch.finfo(x.dtype).min)
        for i in range(rows):
            x = Shift.apply(x) * (i + 1)
        return x.reshape(*x.shape[:-1], 2, 2)


class AsksForWhatModesDecide(Layers):
    """The mode decides a size, which decides a number of layers."""

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(x.narrow(0, 0, 1 if self.training else 2).shape[0]):
            x = self.a(x)
        return x


class AsksForWhatNobodyKnows(Layers):
    """It catches that a question has no answer, in eval mode alone."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(self.a(x), 0.5, self.training)
        try:
            return x if self.training or x.sum() > 0 else -x
        except Exception:
            return x


FOLLOWED = [Layers, Nested, Unpacked, AsksForTypes, Asks]
TRACED = [
    Branches, OtherOrder, Longer, Shorter, OtherLayer, Makes, MakesBoth, Counts, Swallows, OfAnother, WithOpaque, AsksForWhatModesDecide,
]  # fmt: skip
ASKING = (Asks, AsksForWhatModesDecide)


def described(model: nn.Module) -> list[Any]:
    """Trace a model, and return all that its trace says."""
    traced = graphreg.trace(model, X if isinstance(model, ASKING) else None)
    nodes = [
        (mode, node.name, node.op, str(node.target), str(node.args), str(node.kwargs), str(node.meta))
        for mode, graph in traced.graphs.items()
        for node in graph.nodes
    ]
    return [nodes, traced.values, traced.opaque_modules, traced.notes, [*traced.constants]]


def both_ways(monkeypatch: pytest.MonkeyPatch, make: Callable[[], nn.Module], *, followed: bool) -> None:
    model = make()
    results, follow = list[object](), other_mode.literals_in_other_mode

    def noted(*args: Any) -> Any:
        results.append(follow(*args))
        return results[-1]

    monkeypatch.setattr(symbolic, "literals_in_other_mode", noted)
    state = {name: value for name, value in vars(model).items() if name != "_buffers"}
    found = described(model)
    assert {name: value for name, value in vars(model).items() if name != "_buffers"} == state
    assert any(each is not None for each in results) == followed
    monkeypatch.setattr(symbolic, "literals_in_other_mode", lambda *args: None)
    assert described(model) == found


@pytest.mark.parametrize("make", FOLLOWED)
def test_it_is_followed(monkeypatch: pytest.MonkeyPatch, make: type[nn.Module]) -> None:
    both_ways(monkeypatch, make, followed=True)


@pytest.mark.parametrize("make", TRACED)
def test_it_is_traced(monkeypatch: pytest.MonkeyPatch, make: type[nn.Module]) -> None:
    both_ways(monkeypatch, make, followed=False)


@pytest.mark.parametrize("make", [*FOLLOWED, *TRACED])
def test_both_modes_are_the_models_own(make: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = make()
    assert_both_modes_are_the_models(model, X, X if isinstance(model, ASKING) else None)


def test_a_question_without_an_answer_is_refused_in_the_other_mode_too() -> None:
    with pytest.raises(graphreg.TraceError, match="control flow"):
        graphreg.trace(AsksForWhatNobodyKnows(), X, front_end="symbolic")


class Seeds(Layers):
    """It draws, in eval mode alone."""

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.a(x), 0.5, self.training) * (float(torch.rand(())) if not self.training else 1.0)


def test_a_draw_in_the_other_mode_is_refused() -> None:
    model, before = Seeds(), torch.get_rng_state()
    with pytest.raises(graphreg.TraceError, match="draws random numbers"):
        graphreg.trace(model)
    assert torch.equal(torch.get_rng_state(), before)
