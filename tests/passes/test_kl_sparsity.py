from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, kl_divergence

import graphreg
from given_steps import Given
from graphreg.passes import KLSparsity
from penalties import agrees, before_and_after, nothing_else_changes, of, on_values, random, refused, same_compiled
from two_layers import TwoLayers, X

Z = torch.tensor([[0.2, 0.4], [0.6, 0.0]])


def autoencoder() -> nn.Module:
    model = TwoLayers()
    model.act = nn.Sigmoid()
    return model


def test_before_and_after() -> None:
    before_and_after(on_values("kl_sparsity"), autoencoder(), kl_sparsity=1.0)


def test_by_hand() -> None:
    """The means are 0.4 and 0.2; with a target of 0.2 the second costs nothing."""
    value = 0.2 * math.log(0.2 / 0.4) + 0.8 * math.log(0.8 / 0.6)
    assert of(KLSparsity("mul", 0.5, target=0.2), Given(Z), torch.ones(2, 2)) == pytest.approx(0.5 * value)


def test_against_torch_and_differences() -> None:
    def theirs(units: Tensor) -> Tensor:
        return kl_divergence(Bernoulli(torch.tensor(0.05, dtype=torch.float64)), Bernoulli(units.mean(0))).sum()

    agrees(KLSparsity("*", 1.0), theirs, random(5, 3).sigmoid())


def test_units_that_are_off_or_on_have_a_number() -> None:
    units = torch.tensor([[0.0, 1.0], [0.0, 1.0]], requires_grad=True)
    penalty = KLSparsity("*", 1.0)(units)
    penalty.backward()
    assert penalty.isfinite() and units.grad is not None and units.grad.isfinite().all()


def test_compiled() -> None:
    same_compiled(KLSparsity("*", 0.5), autoencoder())


def test_what_must_not_change() -> None:
    nothing_else_changes(KLSparsity("*", 0.5), autoencoder())


def test_errors() -> None:
    refused("KLSparsity: target=1.0 is not allowed; target must be a number above 0 and below 1.",
            lambda: KLSparsity("*", 1, target=1.0))  # fmt: skip
    refused("KLSparsity: target='low' is not allowed", lambda: KLSparsity("*", 1, target="low"))  # type: ignore[arg-type]
    refused(
        "KLSparsity at act: the value has the number 2; all numbers must be in [0, 1]. Select values in this range, as '**@Sigmoid' or "
        "'**@sigmoid' does, or use another penalty (hidden_l1 takes any numbers). If dropout or noise acts at this "
        "value, too, give clean=True: the penalty then measures the value before it.",
        lambda: graphreg.regularize(TwoLayers(), kl_sparsity=0.1)(X),
    )


def test_a_compiled_graph_asserts_the_range() -> None:
    run = torch.compile(graphreg.regularize(Given(Z), KLSparsity("mul", 0.1)), backend="aot_eager", fullgraph=True)
    run(torch.ones(2, 2))
    with pytest.raises(RuntimeError, match=r"KLSparsity at mul: the value must be in \[0, 1\]"):
        run(torch.full((2, 2), 9.0))
