from __future__ import annotations

import pytest
import torch
from torch import nn

import graphreg
from graphreg.passes import GaussianNoise
from two_layers import BEFORE, TwoLayers, X, text


def test_before_and_after() -> None:
    module = graphreg.regularize(TwoLayers(), input_noise=0.5, rng=0)
    assert (
        text(module.code)
        == """key = self.graphreg_rules.key()
x_input_noise = self.graphreg_rules.x_input_noise(x, key)
a = self.a(x_input_noise)
act = self.act(a)
b = self.b(act)
return graphreg_Regularized(b, {})"""
    )
    assert text(graphreg.strip(module).code) == BEFORE


def test_mean_and_variance() -> None:
    """z + ε with ε ~ N(0, σ²), over 10⁵ draws; two calls draw apart."""
    sigma = 0.3
    module = graphreg.regularize(nn.Sequential(nn.Identity(), nn.Linear(1, 1)), GaussianNoise("0", sigma), rng=1)
    seen: list[torch.Tensor] = []
    module.graphreg_rules._0_noise.register_forward_hook(lambda m, a, out: seen.append(out - a[0]))
    for _ in range(2):
        module(torch.full((100_000, 1), 5.0))
    first, second = (s.double().flatten() for s in seen)
    assert abs(float(first.mean())) < 4 * sigma / 1e5**0.5
    assert abs(float(first.var()) - sigma**2) < 4 * sigma**2 * (2 / 1e5) ** 0.5
    assert abs(float((first * second).mean())) < 4 * sigma**2 / 1e5**0.5


def test_the_gradient_passes_unchanged() -> None:
    """d(z + ε)/dz = 1, so the first layer's gradient is that of the model on the noisy input."""
    model = nn.Sequential(nn.Identity(), nn.Linear(2, 1, bias=False))
    module = graphreg.regularize(model, GaussianNoise("0", 0.3), rng=1)
    x = X.clone().requires_grad_()
    module(x).output.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, model[1].weight.expand(2, 2))


def test_what_must_not_change() -> None:
    model = TwoLayers()
    module = graphreg.regularize(model, hidden_noise=0.5, rng=0)
    assert torch.equal(module.eval()(X).output, model(X))
    module.train()
    assert not torch.equal(module(X).output, model(X))
    graphreg.set_strength(module, "hidden_noise", 0.0)
    assert torch.equal(module(X).output, model(X))


def test_errors() -> None:
    with pytest.raises(graphreg.RegularizerError, match=r"GaussianNoise: weight=-0.1 is not allowed; weight must be 0 or more"):
        GaussianNoise("*", -0.1)
    with pytest.raises(graphreg.RegularizerError, match="only floating-point values can be spliced"):
        graphreg.regularize(nn.Sequential(nn.Identity(), nn.Linear(2, 2)), GaussianNoise("0", 0.1))(torch.ones(2, 2, dtype=torch.long))
    nested = torch.nested.nested_tensor([torch.ones(3, 2), torch.ones(1, 2)], layout=torch.jagged)
    with pytest.raises(graphreg.RegularizerError, match="GaussianNoise at 0: the value is a nested tensor, and masks and noise need sizes"):
        graphreg.regularize(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), GaussianNoise("0", 0.1))(nested)
