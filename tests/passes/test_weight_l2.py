from __future__ import annotations

import pytest
from torch import nn

import graphreg
from graphreg.passes import WeightL2
from two_layers import BEFORE, TwoLayers, X, number, text


def test_before_and_after() -> None:
    module = graphreg.regularize(TwoLayers(), weight_l2=1.0)
    assert (
        text(module.code)
        == """a = self.a(x)
act = self.act(a)
b = self.b(act)
a_weight = self.a.weight
b_weight = self.b.weight
weight_l2 = self.graphreg_rules.weight_l2(a_weight, b_weight)
return graphreg_Regularized(b, {'weight_l2': weight_l2})"""
    )
    assert text(graphreg.strip(module).code) == BEFORE


def test_by_hand() -> None:
    """mean A² = 2/4, mean B² = 20/2: their mean is 5.25; the sum of all squares is 22."""
    for options, value in (({}, 5.25), ({"reduction": "sum"}, 22.0)):
        module = graphreg.regularize(TwoLayers(), WeightL2("*", 0.5, **options))  # type: ignore[arg-type]
        assert number(module(X).penalties["weight_l2"]) == 0.5 * value


def test_the_gradient_is_the_decay_that_the_report_prints() -> None:
    """SGD's weight_decay adds d·w to the gradient; the report's d is the penalty's gradient over w."""
    model = TwoLayers()
    module = graphreg.regularize(model, WeightL2("*", 1e-3))
    module(X).penalties["weight_l2"].backward()
    decays = [number((p.grad / p)[p != 0].mean()) for p in model.parameters()]
    assert decays == pytest.approx([2e-3 / 2 / 4, 2e-3 / 2 / 2], rel=1e-5)
    assert "equivalent SGD weight_decay: 0.00025 to 0.0005, by parameter" in graphreg.report(module).text(None)
    summed = graphreg.regularize(TwoLayers(), WeightL2("*", 1e-3, reduction="sum"))
    assert "equivalent SGD weight_decay: 0.002" in graphreg.report(summed).text(None)


def test_what_must_not_change() -> None:
    """Biases and scales have one dim and are left alone; a tied weight counts once; eval is as train."""
    model = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.Linear(3, 3), nn.Linear(3, 3))
    model[3].weight = model[2].weight
    plan = graphreg.plan(graphreg.trace(model), WeightL2("*", 1.0))
    assert [edit.site.name for edit in plan.edits] == ["0.weight", "2.weight"]
    module = graphreg.regularize(model, WeightL2("*", 1.0))
    assert number(module.eval()(X).penalties["weight_l2"]) == number(module.train()(X).penalties["weight_l2"])


def test_alias() -> None:
    assert isinstance(graphreg.build("weight_decay", weight=1), WeightL2)


def test_errors() -> None:
    with pytest.raises(graphreg.RegularizerError, match="WeightL2: weight=-1.0 is not allowed; weight must be 0 or more"):
        WeightL2("*", -1)
    with pytest.raises(graphreg.RegularizerError, match="WeightL2: reduction='max' is not allowed; reduction must be 'mean' or 'sum'"):
        WeightL2("*", 1, reduction="max")
    with pytest.raises(graphreg.NoMatchError, match="It finds only what cannot be regularized: 0.bias"):
        graphreg.regularize(nn.Sequential(nn.Linear(2, 2)), WeightL2("*.bias", 1))
