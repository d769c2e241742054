from __future__ import annotations

import pytest
import torch
from torch import nn

import graphreg
from graphreg.passes import HiddenL1
from two_layers import BEFORE, TwoLayers, X, number, text


def test_before_and_after() -> None:
    module = graphreg.regularize(TwoLayers(), hidden_l1=1.0)
    assert (
        text(module.code)
        == """a = self.a(x)
act = self.act(a)
act_hidden_l1 = self.graphreg_rules.act_hidden_l1(act)
b = self.b(act)
hidden_l1 = self.graphreg_rules.hidden_l1(act_hidden_l1)
return graphreg_Regularized(b, {'hidden_l1': hidden_l1})"""
    )
    assert text(graphreg.strip(module).code) == BEFORE


def test_by_hand() -> None:
    """a = [[1, 2], [3, -0.5]], h = relu(a) = [[1, 2], [3, 0]]: mean |a| = 6.5/4, mean |h| = 6/4, and both on average."""
    for selector, value in (("a", 6.5 / 4), ("act", 6 / 4), (["a", "act"], 12.5 / 8)):
        module = graphreg.regularize(TwoLayers(), HiddenL1(selector, 0.5))
        penalty = module(X).penalties["hidden_l1"]
        assert number(penalty) == 0.5 * value
        assert penalty.dim() == 0


def test_gradient_by_hand() -> None:
    """d mean|a| / dA_ij = Σ_b sign(a_bi) x_bj / 4."""
    model = TwoLayers()
    graphreg.regularize(model, HiddenL1("a", 1.0))(X).penalties["hidden_l1"].backward()
    sign = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    assert torch.equal(model.a.weight.grad, sign.T @ X / 4)
    assert model.b.weight.grad is None


def test_each_value_counts_once() -> None:
    """A site that two strings and three names find is one site."""
    model = nn.Sequential(TwoLayers(), nn.Linear(1, 1))
    module = graphreg.regularize(model, HiddenL1(["0.act", "0.a*", "*act"], 1.0, expect=2))
    assert number(module(X).penalties["hidden_l1"]) == 12.5 / 8


def test_clean_reads_before_the_splices() -> None:
    model = TwoLayers()
    regularizers = [HiddenL1("act", 1.0, name="after"), HiddenL1("act", 1.0, clean=True, name="before")]
    module = graphreg.regularize(model, *regularizers, dropout={"act": 0.9}, rng=1)
    penalties = module(X).penalties
    assert number(penalties["before"]) == 1.5
    assert number(penalties["after"]) != 1.5


def test_what_must_not_change() -> None:
    model = TwoLayers()
    module = graphreg.regularize(model, hidden_l1=1.0)
    for mode in (True, False):  # a penalty is the same in both modes
        assert torch.equal(module.train(mode)(X).output, model(X))
        assert number(module(X).penalties["hidden_l1"]) == 1.5


def test_normalizations_are_left_out_of_the_default() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 1))
    plan = graphreg.plan(graphreg.trace(model), graphreg.from_kwargs(model, hidden_l1=1.0, hidden_dropout=0.1))
    assert [e.site.name for e in plan.of("hidden_l1")] == ["3"]
    assert [e.site.name for e in plan.of("hidden_dropout")] == ["1", "3"]


def test_errors() -> None:
    with pytest.raises(graphreg.RegularizerError, match="HiddenL1: weight=-1.0 is not allowed; weight must be 0 or more"):
        HiddenL1("*", -1)
    with pytest.raises(
        graphreg.NoMatchError, match=r"Linear has none of the default sites of HiddenL1 \(the hidden values\).*graphreg.names\(model\)"
    ):
        graphreg.regularize(nn.Linear(2, 2), hidden_l1=1.0)
    normed = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2), nn.Linear(2, 2))
    with pytest.raises(graphreg.NoMatchError, match=r"; it has hidden outputs of norms \(1\), which '\*\*#hidden' selects\. Name a value"):
        graphreg.regularize(normed, hidden_l1=1.0)
    assert "hidden_l1" in graphreg.regularize(normed, hidden_l1={"weight": 1.0, "pattern": "**#hidden"})(torch.ones(1, 2))[1]
