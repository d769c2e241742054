from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from graphreg.passes import Orthogonality
from penalties import agrees, before_and_after, nothing_else_changes, of, on_parameters, random, refused, same_compiled


def test_before_and_after() -> None:
    before_and_after(on_parameters("orthogonality"), orthogonality=1.0)


def test_by_hand() -> None:
    """A Aᵀ is the identity, B Bᵀ = 4 + 16 is 19 more."""
    assert of(Orthogonality("*", 0.5)) == 0.5 * 19**2 / 2
    assert of(Orthogonality("*", 0.5, reduction="sum")) == 0.5 * 19**2


@pytest.mark.parametrize("shape", [(2, 3, 2), (5, 3)])
def test_against_singular_values_and_differences(shape: tuple[int, ...]) -> None:
    """The Gram matrix of the smaller side has the squared singular values."""

    def theirs(w: Tensor) -> Tensor:
        return (torch.linalg.svdvals(w.flatten(1)).square() - 1).square().sum()

    agrees(Orthogonality("*", 1.0), theirs, random(*shape))


@pytest.mark.parametrize("shape", [(2, 3), (3, 2), (2, 3, 2)])
def test_an_orthogonal_weight_costs_nothing(shape: tuple[int, ...]) -> None:
    assert float(Orthogonality("*", 1.0)(nn.init.orthogonal_(torch.empty(shape, dtype=torch.float64)))) < 1e-28


def test_compiled() -> None:
    same_compiled(Orthogonality("*", 0.5))


def test_what_must_not_change() -> None:
    nothing_else_changes(Orthogonality("*", 0.5))


def test_errors() -> None:
    refused("Orthogonality: reduction=None is not allowed; reduction must be 'mean' or 'sum'.",
            lambda: Orthogonality("*", 1, reduction=None))  # type: ignore[arg-type]  # fmt: skip
