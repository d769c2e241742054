from __future__ import annotations

import pytest
import torch
from torch import Tensor

from graphreg.passes import HoyerSquare
from penalties import agrees, before_and_after, nothing_else_changes, of, on_values, random, refused, same_compiled


def test_before_and_after() -> None:
    before_and_after(on_values("hoyer_square"), hoyer_square=1.0)


def test_by_hand() -> None:
    """h = [[1, 2], [3, 0]]: (1 + 2)² / (1 + 4) and 3² / 3²."""
    assert of(HoyerSquare("act", 0.5)) == pytest.approx(0.5 * (9 / 5 + 1) / 2)


def test_against_norms_and_differences() -> None:
    def theirs(z: Tensor) -> Tensor:
        ratios = [torch.linalg.vector_norm(example, 1) / torch.linalg.vector_norm(example) for example in z]
        return torch.stack(ratios).square().mean()

    agrees(HoyerSquare("*", 1.0), theirs, random(3, 2, 4))


def test_scale_does_not_matter_and_zeros_cost_nothing() -> None:
    z = torch.tensor([[1.0, 2.0, 0.0]])
    for scale in (1e-15, 1.0, 1e15):
        assert float(HoyerSquare("*", 1.0)(scale * z)) == pytest.approx(9 / 5)
    zeros = torch.zeros(2, 3, requires_grad=True)
    penalty = HoyerSquare("*", 1.0)(zeros)
    penalty.backward()
    assert penalty == 0 and zeros.grad is not None and not zeros.grad.any()
    assert HoyerSquare("*", 1.0)(z[0]) == HoyerSquare("*", 1.0)(z)  # one example


def test_compiled() -> None:
    same_compiled(HoyerSquare("*", 0.5))


def test_what_must_not_change() -> None:
    nothing_else_changes(HoyerSquare("*", 0.5))


def test_errors() -> None:
    refused("HoyerSquare: weight=-1.0 is not allowed; weight must be 0 or more.", lambda: HoyerSquare("*", -1))
