from __future__ import annotations

import pytest
import torch
from torch import nn

import graphreg
from graphreg.passes import L2SP
from penalties import before_and_after, on_parameters
from two_layers import TwoLayers, X, number


def test_before_and_after() -> None:
    before_and_after(on_parameters("l2_sp"), l2_sp=1.0)


def test_by_hand() -> None:
    """0 at the start; after w += [[1, 0], [0, -2]] the mean of squares is (1 + 4) / 4, and its gradient 2 (w - w0) / 4."""
    model = TwoLayers()
    module = graphreg.regularize(model, l2_sp={"weight": 2.0, "pattern": "a.weight"})
    assert number(module(X).penalties["l2_sp"]) == 0
    with torch.no_grad():
        model.a.weight += torch.tensor([[1.0, 0.0], [0.0, -2.0]])
    penalty = module(X).penalties["l2_sp"]
    assert number(penalty) == pytest.approx(2 * 5 / 4)
    penalty.backward()
    assert torch.equal(model.a.weight.grad, 2 * torch.tensor([[0.5, 0.0], [0.0, -1.0]]))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_it_is_weight_l2_of_the_difference(reduction: str) -> None:
    """WeightL2 on a model whose weights are the differences, over both layers."""
    model, differences = TwoLayers(), TwoLayers()
    module = graphreg.regularize(model, L2SP("*", 0.3, reduction=reduction))
    with torch.no_grad():
        for p, difference in zip(model.parameters(), differences.parameters(), strict=True):
            difference.copy_(torch.linspace(-1, 1, p.numel()).view_as(p))
            p.add_(difference)
    other = graphreg.regularize(differences, weight_l2={"weight": 0.3, "reduction": reduction})
    ours, theirs = module(X).penalties["l2_sp"], other(X).penalties["weight_l2"]
    torch.testing.assert_close(ours, theirs)
    ours.backward()
    theirs.backward()
    torch.testing.assert_close([p.grad for p in model.parameters()], [p.grad for p in differences.parameters()])


def test_training_pulls_back_to_the_start() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False))
    start = model[0].weight.detach().clone()
    module = graphreg.regularize(model, L2SP("*", 1.0, reduction="sum"))
    with torch.no_grad():
        model[0].weight.add_(1.0)
    optimizer = torch.optim.SGD(model.parameters(), 0.25)
    for _ in range(20):
        optimizer.zero_grad()
        module(X).penalties["l2_sp"].backward()
        optimizer.step()
    torch.testing.assert_close(model[0].weight.detach(), start, rtol=0, atol=1e-5)


def test_errors() -> None:
    with pytest.raises(graphreg.RegularizerError, match=r"L2SP: weight=-1\.0 is not allowed; weight must be 0 or more"):
        L2SP("*", -1.0)
    with pytest.raises(graphreg.RegularizerError, match=r"L2SP: reduction='max' is not allowed; reduction must be 'mean' or 'sum'"):
        L2SP("*", 1.0, reduction="max")


def test_strengths_by_site_count() -> None:
    """Each measurement is multiplied by the strength at its site, as for penalties without a state."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    module = graphreg.regularize(model, l2_sp=0.5)
    graphreg.set_strength(module, "l2_sp", {"1.weight": 2.0})
    with torch.no_grad():
        model[0].weight.add_(1.0)
        model[1].weight.add_(3.0)
    assert module(torch.zeros(1, 2)).penalties["l2_sp"].item() == pytest.approx((0.5 * 1 + 2.0 * 9) / 2)
