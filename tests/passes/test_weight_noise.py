from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import graphreg
from graphreg.passes import WeightNoise
from parameter_splices import acts_on_the_weight_alone, of_weight, same_compiled_weights
from two_layers import BEFORE, TwoLayers, X, text


def test_before_and_after() -> None:
    module = graphreg.regularize(TwoLayers(), weight_noise={"weight": 0.5, "pattern": "b.weight"}, rng=0)
    assert (
        text(module.code)
        == """key = self.graphreg_rules.key()
a = self.a(x)
act = self.act(a)
b_weight = self.b.weight
b_weight_weight_noise = self.graphreg_rules.b_weight_weight_noise(b_weight, key)
b_layer = self.b
b = graphreg_ir_layer_calls_call_with(act, graphreg_layer = b_layer, graphreg_parameters = {'weight': b_weight_weight_noise})
return graphreg_Regularized(b, {})"""
    )
    assert text(graphreg.strip(module).code) == BEFORE


def test_mean_variance_and_calls() -> None:
    """w + ε with ε ~ N(0, σ²), over 10⁵ draws; two calls draw apart."""
    sigma, w = 0.3, torch.full((1000, 100), 5.0)
    first, second = (((out - w).double().flatten()) for out in of_weight(WeightNoise("*", sigma), w, calls=2))
    assert abs(float(first.mean())) < 4 * sigma / 1e5**0.5
    assert abs(float(first.var()) - sigma**2) < 4 * sigma**2 * (2 / 1e5) ** 0.5
    assert abs(float((first * second).mean())) < 4 * sigma**2 / 1e5**0.5


def test_the_gradient_is_that_at_the_noisy_weight() -> None:
    """y = w' x, loss = y²/2: dL/dw = y x, with y of the noisy weight."""
    layer = nn.Linear(2, 1, bias=False)
    module = graphreg.regularize(nn.Sequential(layer), WeightNoise("*", 0.5), rng=1)
    x = X[:1]
    y = module(x).output
    (y.square() / 2).sum().backward()
    assert layer.weight.grad is not None
    torch.testing.assert_close(layer.weight.grad, y.detach() * x)


def test_what_must_not_change() -> None:
    acts_on_the_weight_alone(WeightNoise("*", 0.3))


def test_half_precision_and_compiled() -> None:
    layer = nn.Linear(4, 3).to(torch.bfloat16)
    out = graphreg.regularize(nn.Sequential(layer), WeightNoise("*", 0.1), rng=0)(torch.ones(2, 4, dtype=torch.bfloat16)).output
    assert out.dtype == torch.bfloat16
    same_compiled_weights(WeightNoise("*", 0.1), nn.Conv1d(2, 3, 2), torch.ones(2, 2, 5))


def test_errors() -> None:
    with pytest.raises(graphreg.RegularizerError, match=r"WeightNoise: weight=-0.1 is not allowed; weight must be 0 or more"):
        WeightNoise("*", -0.1)
    with pytest.raises(graphreg.NoMatchError, match="it has none|has none of the default sites of WeightNoise"):
        graphreg.regularize(nn.Sequential(nn.BatchNorm1d(2)), weight_noise=0.1)


def test_compiled_with_dynamic_sizes() -> None:
    """Dynamo makes the numbers that a formula reads from elsewhere inputs of the graph, and normal noise is recomputed in backward."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.SELU(), nn.Linear(4, 2))
    options: dict[str, Any] = {"weight_noise": 0.1, "alpha_dropout": {"1": 0.2}}
    eager, compiled = (graphreg.regularize(model, rng=0, **options) for _ in range(2))
    compiled = torch.compile(compiled, dynamic=True, fullgraph=True, backend="aot_eager")
    for size in (3, 5):
        x = torch.randn(size, 4)
        torch.testing.assert_close(compiled(x).output, eager(x).output)
