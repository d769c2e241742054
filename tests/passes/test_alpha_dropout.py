from __future__ import annotations

import torch
import torch.nn.functional as F

import graphreg
from graphreg.passes import AlphaDropout
from spliced import acts_in_train_mode_alone, formula, needs_a_rate, same_along, same_compiled, spliced
from two_layers import BEFORE, TwoLayers, text


def test_before_and_after() -> None:
    module = graphreg.regularize(TwoLayers(), alpha_dropout=0.5, rng=0)
    assert (
        text(module.code)
        == """key = self.graphreg_rules.key()
a = self.a(x)
act = self.act(a)
act_alpha_dropout = self.graphreg_rules.act_alpha_dropout(act, key)
b = self.b(act_alpha_dropout)
return graphreg_Regularized(b, {})"""
    )
    assert text(graphreg.strip(module).code) == BEFORE


def test_by_hand() -> None:
    """p = 0.5: a = (0.5 (1 + 0.5 · 3.0909))^-½ = 0.88640, b = 0.5 · 1.7581 a = 0.77919; what is dropped is -1.7581 a + b = -b."""
    z = torch.tensor([1.0, 2.0, -1.0], requires_grad=True)
    y = formula(AlphaDropout("0", 0.5), z, torch.tensor([1.0, 0.0, 1.0]))
    torch.testing.assert_close(y, torch.tensor([1.66560, -0.77919, -0.10721]), rtol=0, atol=1e-5)
    y.sum().backward()
    torch.testing.assert_close(z.grad, torch.tensor([0.88640, 0.0, 0.88640]), rtol=0, atol=1e-5)


def test_the_formula_is_torchs_given_the_mask() -> None:
    """``F.alpha_dropout``, and ``F.feature_alpha_dropout``, which shares a draw along the axes of a map."""
    z = torch.linspace(-2, 3, 4 * 6 * 3 * 3).view(4, 6, 3, 3)
    for function in (F.alpha_dropout, F.feature_alpha_dropout):
        drawn = []
        for value in (torch.zeros_like(z), z):
            torch.manual_seed(0)
            drawn.append(function(value, 0.3, training=True))
        mask = (drawn[0] > 0).float()  # of zeros, torch gives b > 0 where it keeps
        assert 0 < float(mask.mean()) < 1
        torch.testing.assert_close(formula(AlphaDropout("0", 0.3), z, mask), drawn[1])


def test_mean_and_variance_stay() -> None:
    """Of a normal value with mean 0 and variance 1, over 10⁵ draws, whatever the rate."""
    z = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    for p in (0.05, 0.5):
        y = spliced(AlphaDropout("0", p), z)
        assert abs(float(y.mean())) < 0.02 and abs(float(y.var()) - 1) < 0.03


def test_shared_axes() -> None:
    y = spliced(AlphaDropout("0", 0.5, share_axes=(-1, -2)), torch.ones(8, 4, 3, 3))
    assert same_along(y, (2, 3)) and not same_along(y, (0,)) and not same_along(y, (1,))


def test_modes_and_strength_0() -> None:
    acts_in_train_mode_alone(AlphaDropout("0", 0.5), torch.rand(4, 3))


def test_compiled() -> None:
    same_compiled(AlphaDropout("0", 0.5), torch.randn(4, 3))


def test_errors() -> None:
    needs_a_rate(AlphaDropout)
