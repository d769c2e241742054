from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

import graphreg
from graphreg.passes import SpectralPenalty
from penalties import before_and_after, on_parameters
from two_layers import TwoLayers, X, number


def test_before_and_after() -> None:
    before_and_after(on_parameters("spectral"), spectral=1.0)


def test_by_hand() -> None:
    """diag(3, 1): s² = 9 and its gradient 2s u vᵀ = diag(6, 0), once the iteration has converged."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.diag(torch.tensor([3.0, 1.0])))
    module = graphreg.regularize(model, spectral=0.5)
    penalty = module(X).penalties["spectral"]
    assert number(penalty) == pytest.approx(4.5)
    penalty.backward()
    torch.testing.assert_close(model[0].weight.grad, torch.diag(torch.tensor([3.0, 0.0])), rtol=0, atol=1e-5)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_it_is_the_largest_singular_value(reduction: str) -> None:
    """After some calls, of a dense layer and of a convolution, whose weight is read as [out, the rest]; and the gradient of that."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(2, 5, 3), nn.Linear(4, 7))
    module, x = graphreg.regularize(model, SpectralPenalty("*", 1.0, reduction=reduction)), torch.ones(1, 2, 6)
    for _ in range(60):
        penalty = module(x).penalties["spectral"]
    squares = [torch.linalg.svdvals(layer.weight.flatten(1))[0].square() for layer in model]
    expected = torch.stack(squares).mean() if reduction == "mean" else torch.stack(squares).sum()
    torch.testing.assert_close(penalty, expected, rtol=1e-4, atol=1e-5)
    gradients = (torch.autograd.grad(value, [layer.weight for layer in model]) for value in (penalty, expected))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-2)


def test_it_iterates_as_torchs_spectral_norm_does() -> None:
    """From the same vector, three calls of one iteration each: the same estimates of s, which is w / the normalized weight."""
    torch.manual_seed(0)
    weight = torch.randn(6, 4)
    layer, twin = nn.Linear(4, 6, bias=False), nn.Linear(4, 6, bias=False)
    with torch.no_grad():
        layer.weight.copy_(weight)
        twin.weight.copy_(weight)
    theirs = spectral_norm(twin)
    module = graphreg.regularize(nn.Sequential(layer), spectral=1.0)
    state = graphreg.rng_state(module)
    state["state"]["spectral"]["0.weight"]["u"] = theirs.parametrizations.weight[0]._u.clone()
    graphreg.set_rng_state(module, state)
    for _ in range(3):
        sigma = (weight / theirs.weight).mean()
        torch.testing.assert_close(module(torch.ones(1, 4)).penalties["spectral"], sigma.square())


def test_in_eval_mode_the_iteration_stands_still() -> None:
    torch.manual_seed(0)
    module = graphreg.regularize(nn.Sequential(nn.Linear(8, 8)), spectral=1.0).eval()
    x, before = torch.ones(1, 8), graphreg.rng_state(module)
    assert torch.equal(module(x).penalties["spectral"], module(x).penalties["spectral"])
    module.train()(x)
    after = graphreg.rng_state(module)
    assert not torch.equal(before["state"]["spectral"]["0.weight"]["u"], after["state"]["spectral"]["0.weight"]["u"])


def test_its_start_does_not_depend_on_autocast() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5))
    outside = graphreg.regularize(model, spectral=0.1)
    with torch.autocast("cpu"):
        inside = graphreg.regularize(model, spectral=0.1)
    x = torch.ones(1, 6)
    assert torch.equal(outside(x).penalties["spectral"], inside(x).penalties["spectral"])


def test_what_must_not_change() -> None:
    model = TwoLayers()
    module = graphreg.regularize(model, spectral=1.0)
    assert torch.equal(module(X).output, model(X)) and list(module.state_dict()) == list(model.state_dict())


def test_errors() -> None:
    with pytest.raises(
        graphreg.RegularizerError, match=r"SpectralPenalty: iterations=0 is not allowed; iterations must be a whole number, 1"
    ):
        SpectralPenalty("*", 1.0, iterations=0)
    with pytest.raises(graphreg.RegularizerError, match=r"SpectralPenalty: weight=-1\.0 is not allowed"):
        SpectralPenalty("*", -1.0)
