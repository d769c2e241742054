from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

import graphreg
from graphreg.passes import GroupLasso
from penalties import agrees, before_and_after, nothing_else_changes, of, on_parameters, random, refused, same_compiled
from two_layers import TwoLayers


def test_before_and_after() -> None:
    before_and_after(on_parameters("group_lasso"), group_lasso=1.0)


def test_by_hand() -> None:
    """Rows: of A two of norm 1, of B one of norm √20, each of 2 weights. Columns: of A two of norm 1, of B 2 and 4, of 1 weight each."""
    rows, columns = (2 * 2**0.5, 20**0.5 * 2**0.5), (2 * 2**0.5, 2 + 4)
    assert of(GroupLasso("*", 0.5)) == pytest.approx(0.5 * sum(rows) / 2)
    assert of(GroupLasso("*", 0.5, axis=1)) == pytest.approx(0.5 * sum(columns) / 2)
    assert of(GroupLasso("*", 0.5, reduction="sum")) == pytest.approx(0.5 * sum(rows))


def test_against_numpy_and_differences() -> None:
    def theirs(w: Tensor) -> Tensor:
        groups = [w[:, i].numpy() for i in range(w.shape[1])]
        return torch.tensor(sum(np.sqrt(group.size) * np.linalg.norm(group.ravel()) for group in groups))

    agrees(GroupLasso("*", 1.0, axis=1), theirs, random(3, 2, 4))


def test_a_group_of_zeros_has_the_gradient_0() -> None:
    w = torch.zeros(2, 3, requires_grad=True)
    GroupLasso("*", 1.0)(w).backward()
    assert w.grad is not None and not w.grad.any()


def test_compiled() -> None:
    same_compiled(GroupLasso("*", 0.5))


def test_what_must_not_change() -> None:
    nothing_else_changes(GroupLasso("*", 0.5))


def test_errors() -> None:
    refused("GroupLasso: axis='rows' is not allowed; axis must be a whole number, or 'elements'.",
            lambda: GroupLasso("*", 1, axis="rows"))  # type: ignore[arg-type]  # fmt: skip
    refused("GroupLasso at a.weight: axis=2 is out of range for shape (2, 2). Give an axis from -2 to 1.",
            lambda: graphreg.regularize(TwoLayers(), GroupLasso("*", 0.1, axis=2)))  # fmt: skip
