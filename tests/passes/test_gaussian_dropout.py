from __future__ import annotations

import pytest
import torch
from torch import nn

import graphreg
from graphreg.passes import GaussianDropout
from spliced import acts_in_train_mode_alone, formula, needs_a_rate, same_along, same_compiled, spliced
from two_layers import BEFORE, TwoLayers, text


def test_before_and_after() -> None:
    module = graphreg.regularize(TwoLayers(), gaussian_dropout=0.5, rng=0)
    assert (
        text(module.code)
        == """key = self.graphreg_rules.key()
a = self.a(x)
act = self.act(a)
act_gaussian_dropout = self.graphreg_rules.act_gaussian_dropout(act, key)
b = self.b(act_gaussian_dropout)
return graphreg_Regularized(b, {})"""
    )
    assert text(graphreg.strip(module).code) == BEFORE


def test_by_hand() -> None:
    """p = 0.8: the standard deviation is sqrt(0.8/0.2) = 2, so draws of 1, -0.5 and 0 multiply by 3, 0 and 1; the gradient, too."""
    z = torch.tensor([2.0, 5.0, -1.0], requires_grad=True)
    y = formula(GaussianDropout("0", 0.8), z, torch.tensor([1.0, -0.5, 0.0]))
    torch.testing.assert_close(y, torch.tensor([6.0, 0.0, -1.0]))
    y.sum().backward()
    torch.testing.assert_close(z.grad, torch.tensor([3.0, 0.0, 1.0]))


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_mean_and_variance_are_those_of_dropout(p: float) -> None:
    """E y = z and Var y = z² p / (1 - p), as of ``nn.Dropout``; unlike there, y is normal: its kurtosis is 3."""
    z, n = 2.0, 40_000
    ours, dropout = spliced(GaussianDropout("0", p), torch.full((n,), z)).double(), nn.Dropout(p)(torch.full((n,), z)).double()
    variance = z * z * p / (1 - p)
    for y in (ours, dropout):
        assert abs(float(y.mean()) - z) < 5 * (variance / n) ** 0.5
        assert abs(float(y.var()) / variance - 1) < 0.06
    scaled = (ours - z) / variance**0.5
    assert abs(float(scaled.pow(4).mean()) - 3) < 5 * (96 / n) ** 0.5


def test_shared_axes() -> None:
    y = spliced(GaussianDropout("0", 0.5, share_axes=("batch", 2)), torch.ones(3, 4, 5))
    assert same_along(y, (0, 2)) and not same_along(y, (1,))


def test_modes_and_strength_0() -> None:
    acts_in_train_mode_alone(GaussianDropout("0", 0.5), torch.rand(4, 3))


def test_compiled() -> None:
    same_compiled(GaussianDropout("0", 0.5), torch.randn(4, 3))


def test_errors() -> None:
    needs_a_rate(GaussianDropout)
