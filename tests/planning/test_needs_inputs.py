"""Errors of a model that can be traced only with example inputs say where to give them."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn

import graphreg
from graphreg import NoMatchError, TraceError

X = torch.randn(2, 4)


class Branching(nn.Module):
    """Without example inputs, torch.fx cannot trace it, because it branches on a size."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.act = nn.Linear(4, 4), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.inner(x)) if x.shape[0] > 1 else x


class Untraceable(Branching):
    """Opaque with example inputs, too, because it branches on values."""

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.inner(x)) if x.sum() > 0 else x


def test_from_kwargs_asks_for_the_trace() -> None:
    with pytest.raises(TraceError, match=re.escape("graphreg.from_kwargs(traced, ...)")):
        graphreg.from_kwargs(Branching(), hidden_dropout=0.1)
    (dropout,) = graphreg.from_kwargs(graphreg.trace(Branching(), example_inputs=X), hidden_dropout=0.1)
    assert dropout.weight == 0.1
    with pytest.raises(TraceError) as caught:  # another cause, which a trace would not cure
        graphreg.from_kwargs(nn.DataParallel(nn.Linear(4, 4)), hidden_dropout=0.1)
    assert "from_kwargs" not in str(caught.value)


def test_a_selector_inside_an_opaque_module_asks_for_inputs() -> None:
    model = nn.Sequential(Branching(), nn.Linear(4, 2))
    message = "'0.inner' is inside the opaque module '0'. Give example_inputs"
    with pytest.raises(NoMatchError, match=re.escape(message)):
        graphreg.regularize(model, dropout={"0.inner": 0.1})
    module = graphreg.regularize(model, dropout={"0.inner": 0.1}, example_inputs=X)
    assert [entry.sites for entry in graphreg.report(module).regularizers] == [("0.inner",)]


@pytest.mark.parametrize(("model", "selector", "inputs"), [
    (nn.Sequential(Branching(), nn.Linear(4, 2)), "0.outer", None),  # no such module
    (nn.Sequential(Untraceable(), nn.Linear(4, 2)), "0.inner", X),  # the inputs were given
])  # fmt: skip
def test_no_other_selector_does(model: nn.Module, selector: str, inputs: Tensor | None) -> None:
    with pytest.raises(NoMatchError) as caught:
        graphreg.regularize(model, dropout={selector: 0.1}, example_inputs=inputs)
    assert "example_inputs" not in str(caught.value)
