"""Strengths that eager code reads once are those that the module has, and derivatives reach them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call

import graphreg
from graphreg import schedules

X = torch.linspace(-1, 1, 12).view(3, 4)


def module() -> Any:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    return graphreg.regularize(layers, gaussian_dropout=0.3, hidden_l1=0.5, weight_l2=0.5, rng=0)


def strengths_of(module: Any, change: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    return {name: change(buffer.clone()) for name, buffer in module.named_buffers() if "strength" in name}


def total(result: Any) -> Tensor:
    summed: Tensor = result.output.square().sum() + sum(result.penalties.values())
    return summed


@pytest.mark.parametrize("earlier", [0, 1, 4])
def test_gradients_reach_a_strength_that_functional_call_lends(earlier: int) -> None:
    """By differences of the module itself, whose strengths are changed instead, and whose noise is frozen."""
    ours = module()
    for _ in range(earlier):
        ours(X)
    ours.double()
    x = X.double()
    with graphreg.frozen_noise(ours):
        lent = strengths_of(ours, lambda strength: strength.requires_grad_())
        total(functional_call(ours, lent, (x,))).backward()
        assert len(lent) == 3
        for name, strength in lent.items():
            assert strength.grad is not None and strength.grad.abs().sum() > 0
            for i in range(len(strength)):
                moved = []
                for step in (1e-6, -1e-6):
                    twin = {other: each.detach().clone() for other, each in lent.items()}
                    twin[name][i] += step
                    moved.append(total(functional_call(ours, twin, (x,))).item())
                assert float(strength.grad[i]) == pytest.approx((moved[0] - moved[1]) / 2e-6, rel=1e-5, abs=1e-7)


def test_tangents_reach_them() -> None:
    ours = module().double()
    x = X.double()
    for _ in range(3):
        ours(x)
    with graphreg.frozen_noise(ours):
        lent = strengths_of(ours, lambda strength: strength.requires_grad_())
        total(functional_call(ours, lent, (x,))).backward()
        with forward_ad.dual_level():
            dual = {name: forward_ad.make_dual(each.detach(), torch.ones_like(each)) for name, each in lent.items()}
            tangent = forward_ad.unpack_dual(total(functional_call(ours, dual, (x,)))).tangent
        assert tangent is not None
        torch.testing.assert_close(tangent, sum(each.grad.sum() for each in lent.values()))  # type: ignore[union-attr]
        assert forward_ad.unpack_dual(total(ours(x))).tangent is None  # nothing of it is left


def test_a_lent_strength_is_not_kept() -> None:
    ours, twin = module(), module()
    for _ in range(3):
        ours(X)
        twin(X)
    functional_call(ours, strengths_of(ours, lambda strength: strength * 0.5), (X,))
    twin(X)
    assert torch.equal(total(ours(X)), total(twin(X)))
    assert torch.equal(total(copy.deepcopy(ours)(X)), total(twin(X)))


class Mixed(nn.Module):
    """Two values, the first of float32, the second of float64."""

    def __init__(self) -> None:
        super().__init__()
        self.narrow, self.wide = nn.Linear(4, 4), nn.Linear(4, 4).double()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.wide(self.narrow(x).relu().double()).tanh()
        return y


def test_a_total_of_several_dtypes_is_multiplied_by_the_strength_in_the_widest() -> None:
    ours = graphreg.regularize(Mixed(), graphreg.passes.HiddenL1(["relu", "tanh"], 0.1))
    penalty = ours(X).penalties["hidden_l1"]
    narrow = ours.get_submodule("narrow")(X).relu()
    wide = ours.get_submodule("wide")(narrow.double()).tanh()
    assert penalty.dtype == torch.float64
    torch.testing.assert_close(penalty, 0.1 * (narrow.abs().mean().double() + wide.abs().mean()) / 2, rtol=1e-14, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("by_site", [False, True])
@pytest.mark.parametrize("change", [0.0, 0.9])
def test_backward_has_the_strengths_of_its_call(dtype: torch.dtype, by_site: bool, change: float) -> None:
    """Also in float64, the dtype of the strengths: there, no conversion makes a copy."""
    found = []
    for changes in (False, True):
        ours = module().to(dtype)
        if by_site:
            graphreg.set_strength(ours, "hidden_l1", {"1": 0.1})
            graphreg.set_strength(ours, "weight_l2", {"0.weight": 0.1})
        loss = total(ours(X.to(dtype)))
        for name in graphreg.strengths(ours) if changes else ():
            graphreg.set_strength(ours, name, change)
        loss.backward()
        found.append([parameter.grad for parameter in ours.parameters()])
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


def test_so_has_that_of_compiled_code_if_the_regularizer_was_made_with_a_schedule() -> None:
    made = schedules.linear(0.5, 0.5, 1)
    ours = graphreg.regularize(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), hidden_l1=made)
    run, found = torch.compile(ours, backend="aot_eager"), []
    for change in (None, 0.0, 0.9, schedules.linear(0.1, 1.0, 3)):
        graphreg.set_strength(ours, "hidden_l1", made)
        ours.zero_grad()
        loss = total(run(X))
        if change is not None:
            graphreg.set_strength(ours, "hidden_l1", change)
        loss.backward()
        found.append([parameter.grad for parameter in ours.parameters()])
    for gradients in found[1:]:
        torch.testing.assert_close(gradients, found[0], rtol=0, atol=0)
