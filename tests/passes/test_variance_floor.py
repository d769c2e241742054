from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

import graphreg
from graphreg.passes import VarianceFloor
from penalties import agrees, before_and_after, nothing_else_changes, of, on_values, random, refused, same_compiled
from two_layers import TwoLayers, X


def test_before_and_after() -> None:
    before_and_after(on_values("variance_floor"), variance_floor=1.0)


def test_by_hand() -> None:
    """h = [[1, 2], [3, 0]]: both variances are 2, unbiased, and above the usual floor of 1."""
    assert of(VarianceFloor("act", 0.5)) == 0
    assert of(VarianceFloor("act", 0.5, gamma=2.0)) == pytest.approx(0.5 * (2 - 2.0001**0.5))


def test_against_numpy_and_differences() -> None:
    def theirs(units: Tensor) -> Tensor:
        return torch.tensor(np.maximum(0, 0.93 - np.sqrt(np.var(units.numpy(), axis=0, ddof=1) + 1e-4)).mean())

    z = random(5, 3)
    assert 0 < int((z.std(0) < 0.93).sum()) < 3  # a unit on each side
    agrees(VarianceFloor("*", 1.0, gamma=0.93), theirs, z)


def test_units_that_do_not_vary_have_a_gradient() -> None:
    units = torch.ones(3, 2, requires_grad=True)
    penalty = VarianceFloor("*", 1.0)(units)
    penalty.backward()
    assert penalty.item() == pytest.approx(1 - 0.01) and units.grad is not None and units.grad.isfinite().all()


def test_compiled() -> None:
    same_compiled(VarianceFloor("*", 0.5, gamma=2.0))


def test_what_must_not_change() -> None:
    nothing_else_changes(VarianceFloor("*", 0.5, gamma=2.0))


def test_errors() -> None:
    refused("VarianceFloor: gamma=0.0 is not allowed; gamma must be a number above 0.", lambda: VarianceFloor("*", 1, gamma=0.0))
    refused("VarianceFloor at act: the value has shape (1, 2), and so 1 sample of 2 units",
            lambda: graphreg.regularize(TwoLayers(), variance_floor=0.1)(X[:1]))  # fmt: skip
