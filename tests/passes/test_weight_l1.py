from __future__ import annotations

import pytest
import torch
from torch import nn

import graphreg
from graphreg.passes import WeightL1
from two_layers import BEFORE, TwoLayers, X, number, text


def test_before_and_after() -> None:
    module = graphreg.regularize(TwoLayers(), weight_l1=1.0)
    assert (
        text(module.code)
        == """a = self.a(x)
act = self.act(a)
b = self.b(act)
a_weight = self.a.weight
b_weight = self.b.weight
weight_l1 = self.graphreg_rules.weight_l1(a_weight, b_weight)
return graphreg_Regularized(b, {'weight_l1': weight_l1})"""
    )
    assert text(graphreg.strip(module).code) == BEFORE


def test_by_hand() -> None:
    """mean |A| = 2/4, mean |B| = 6/2: their mean is 1.75; the sum of all is 8."""
    for options, value in (({}, 1.75), ({"reduction": "sum"}, 8.0)):
        module = graphreg.regularize(TwoLayers(), WeightL1("*", 0.5, **options))  # type: ignore[arg-type]
        assert number(module(X).penalties["weight_l1"]) == 0.5 * value


def test_gradient_by_hand() -> None:
    """sign(w) over the number of elements and of parameters; 0 at 0."""
    model = TwoLayers()
    graphreg.regularize(model, weight_l1=1.0)(X).penalties["weight_l1"].backward()
    assert torch.equal(model.a.weight.grad, torch.tensor([[1.0, 0.0], [0.0, -1.0]]) / 8)
    assert torch.equal(model.b.weight.grad, torch.tensor([[1.0, 1.0]]) / 4)


def test_what_must_not_change() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    module = graphreg.regularize(model, weight_l1=1.0)
    assert torch.equal(module(X).output, model(X))
    module(X).penalties["weight_l1"].backward()
    assert model[0].bias.grad is None


def test_alias() -> None:
    assert isinstance(graphreg.build("WEIGHT_SPARSITY", weight=1), WeightL1)


def test_errors() -> None:
    with pytest.raises(graphreg.RegularizerError, match="WeightL1: weight=-1.0 is not allowed; weight must be 0 or more"):
        WeightL1("*", -1)
    with pytest.raises(graphreg.RegularizerError, match="reduction must be 'mean' or 'sum'"):
        WeightL1("*", 1, reduction="max")
