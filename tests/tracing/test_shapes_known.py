"""Shapes of sites: a trace that has computed values to answer questions takes the shapes from them, where that is certain."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphreg
from graphreg.tracing import fake_inputs


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
