"""Shapes of sites: a trace that has computed values to answer questions takes the shapes from them, where that is certain."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphreg
from graphreg.testing import check_regularizer
from graphreg.tracing import fake_inputs
from graphreg.tracing.shape_decisions import DecisionTracer, decided


class Asks(nn.Module):
    """Its forward unpacks a shape, reads a buffer, a constant and a parameter, and returns a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.drop = nn.Linear(4, 6), nn.Dropout(0.5)
        self.register_buffer("scale", torch.ones(6))

    def forward(self, x: Tensor) -> Any:
        rows, columns = x.shape
        h = self.drop(self.layer(x)) * self.scale + torch.tensor([2.0])
        return h.reshape(*h.shape[:-1], 2, 3) if columns == 4 else h, h.chunk(2, 1), rows


class Turns(Asks):
    """It turns a tensor in place behind a read of it, and asks for a size only then."""

    def forward(self, x: Tensor) -> Any:
        h = self.layer(x)
        before = h * 2
        h.t_()
        columns, rows = h.shape
        return before.sum(0), h.sum(0), columns * rows


class TurnsByFunction(Turns):
    def forward(self, x: Tensor) -> Any:
        h = self.layer(x).unsqueeze(0)
        before = h * len(x)
        torch.ops.aten.squeeze_(h)
        rows, _ = h.shape
        return before.sum(0), h.sum(0), rows if rows > 1 else 1


class AsksNothing(Asks):
    def forward(self, x: Tensor) -> Any:
        return self.drop(self.layer(x))


class Branches(Asks):
    """Two graphs."""

    def forward(self, x: Tensor) -> Any:
        _, columns = x.shape
        h = self.layer(x)
        return h[:, :columns] if self.training and columns > 3 else h


@pytest.mark.parametrize("model", [Asks, Turns, TurnsByFunction, AsksNothing, Branches])
def test_they_are_those_of_a_run(model: type[nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    def shapes() -> Any:
        traced = graphreg.trace(made, torch.randn(3, 4))
        return [(mode, [(node.name, node.meta["value"]) for node in graph.nodes]) for mode, graph in traced.graphs.items()]

    made, propagate = model(), fake_inputs.propagate
    known = list[bool]()

    def noted(*args: Any) -> None:
        known.append(args[-1](next(iter(args[1].values()))) is not None)
        propagate(*args)

    monkeypatch.setattr("graphreg.tracing.trace.propagate", noted)
    found = shapes()
    assert known == [model in (Asks, Branches)]
    monkeypatch.setattr("graphreg.tracing.trace.propagate", lambda *args: propagate(*args[:-1]))
    assert shapes() == found


class Deep(nn.Module):
    """Layers that each ask for a size."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(depth))
        self.scales = nn.ParameterList(torch.ones(4) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for layer, scale in zip(self.layers, self.scales, strict=True):
            h = torch.relu(layer(x) * scale)
            x = x + h if h.shape[1] > 2 else h
        return x


def test_layers_that_are_alike_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    run = DecisionTracer._run
    monkeypatch.setattr(DecisionTracer, "_run", lambda tracer, node: (ran.append(node), run(tracer, node))[1])
    counts = []
    for depth in (2, 12):
        ran.clear()
        graphreg.trace(Deep(depth), torch.ones(3, 4), front_end="symbolic")
        # a decision has no value
        counts.append(len([node for node in ran if node.target is not decided]))
    assert counts[0] == counts[1] > 5


class ReturnsNothing(AsksNothing):
    """Its ``train`` and ``eval`` return nothing; each mode has a graph."""

    def train(self, mode: bool = True) -> None:  # type: ignore[override]
        super().train(mode)

    def eval(self) -> None:  # type: ignore[override]
        super().train(False)

    def forward(self, x: Tensor) -> Any:
        h = self.layer(x)
        return h.tanh() if self.training else h


def test_eval_and_train_of_a_model_may_return_nothing() -> None:
    x, model = torch.ones(3, 4), ReturnsNothing()
    module = graphreg.regularize(model, weight_l2=0.1, example_inputs=x)
    module.eval()
    assert torch.equal(module(x).output, model.layer(x))
    graphreg.regularize_(model, weight_l2=0.1, penalties="return")
    model.train()
    assert isinstance(model(x).output, Tensor)
    check_regularizer(graphreg.passes.WeightL2, model=ReturnsNothing(), inputs=x, backend=None)


class Unlike(nn.Module):
    """Pairs of operations that differ in one setting, an argument or a parameter's shape, each asked for its size."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([
            nn.Linear(6, 4), nn.Linear(6, 5), nn.Conv1d(4, 2, 3), nn.Conv1d(4, 2, 3, stride=2), nn.Conv1d(4, 2, 3, padding=1),
            nn.Flatten(), nn.Flatten(0), nn.MaxPool1d(2), nn.MaxPool1d(2, ceil_mode=True), nn.Unflatten(2, (2, 3)),
            nn.Unflatten(2, (3, 2)), nn.ZeroPad1d(1), nn.ZeroPad1d((1, 2)), nn.Conv1d(4, 2, 3).double(),
        ])  # fmt: skip

    def forward(self, x: Tensor) -> list[Any]:
        values = [layer(x.double() if layer is self.layers[-1] else x) for layer in self.layers]
        values += [x.sum(1), x.sum(1, keepdim=True), x.sum(1, True), x[:, 1:], x[:, 1], x.transpose(0, 1), x.reshape(6, 8), x.chunk(2)[0]]
        values += [torch.cat([x, x]), torch.cat([x, x], 1), torch.stack((x, x)), x.to(torch.float64), x * x.shape[0], x.expand(2, 2, 4, 6)]
        return [value.reshape(value.shape) for value in values if len(value.shape)]


def test_what_is_not_alike_has_its_own_shape() -> None:
    x = torch.ones(2, 4, 6)
    model = Unlike()
    traced = graphreg.trace(model, x, front_end="symbolic")
    assert not traced.opaque_modules
    outputs = [node for graph in traced.graphs.values() for node in graph.nodes if node.op == "output"]
    for node in outputs:
        assert [tuple(each[0]) for each in node.meta["value"]] == [tuple(each.shape) for each in model(x)]
        assert [each[1] for each in node.meta["value"]] == [each.dtype for each in model(x)]


class TurnsOneOfTwo(nn.Module):
    """Two values that are alike, of which one is turned in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Any:
        h, g = self.first(x), self.second(x)
        rows, columns = h.shape
        h.t_()
        turned, _ = h.shape
        again, _ = g.shape
        return g.view(again, 2, -1), h.reshape(turned, -1), rows * columns


def test_a_value_that_is_turned_in_place_leaves_those_that_were_alike() -> None:
    x, model = torch.ones(3, 4), TurnsOneOfTwo()
    module = graphreg.regularize(model, weight_l2=0.1, example_inputs=x, front_end="symbolic")
    for ours, theirs in zip(module(x).output, model(x), strict=True):
        assert torch.equal(torch.as_tensor(ours), torch.as_tensor(theirs))
