from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import Tensor

import graphreg
from graphreg.passes import MaxNorm
from penalties import agrees, before_and_after, nothing_else_changes, of, on_parameters, random, refused, same_compiled
from two_layers import TwoLayers


def test_before_and_after() -> None:
    before_and_after(on_parameters("max_norm"), max_norm={"weight": 1.0, "limit": 1.0})


def test_by_hand() -> None:
    """The rows of A have the norm 1, that of B √20."""
    assert of(MaxNorm("*", 0.5, limit=2)) == pytest.approx(0.5 * (20**0.5 - 2) ** 2 / 2)
    assert of(MaxNorm("*", 0.5, limit=0.5, reduction="sum")) == pytest.approx(0.5 * (0.25 + 0.25 + (20**0.5 - 0.5) ** 2))


def test_against_numpy_and_differences() -> None:
    def theirs(w: Tensor) -> Tensor:
        return torch.tensor(sum(max(0.0, np.linalg.norm(row) - 1.8) ** 2 for row in w.flatten(1).numpy()))

    w = random(4, 2, 2)
    assert 0 < int((w.flatten(1).norm(dim=1) < 1.8).sum()) < 4  # rows on both sides
    agrees(MaxNorm("*", 1.0, limit=1.8), theirs, w)


def test_it_is_the_squared_distance_to_what_torch_cuts_to_the_limit() -> None:
    w = random(4, 2, 2)
    torch.testing.assert_close(MaxNorm("*", 1.0, limit=1.8)(w), (w - torch.renorm(w, 2, 0, 1.8)).square().sum(), rtol=1e-6, atol=0)


def test_rows_of_zeros_have_the_gradient_0() -> None:
    w = torch.zeros(2, 3, requires_grad=True)
    MaxNorm("*", 1.0, limit=1.0)(w).backward()
    assert w.grad is not None and not w.grad.any()


def test_it_is_copied_and_pickled() -> None:
    """These make an instance without arguments first, and the limit has no default."""
    regularizer = MaxNorm("*", 0.5, limit=2)
    assert copy.deepcopy(regularizer) == pickle.loads(pickle.dumps(regularizer)) == regularizer


def test_compiled() -> None:
    same_compiled(MaxNorm("*", 0.5, limit=1.0))


def test_what_must_not_change() -> None:
    nothing_else_changes(MaxNorm("*", 0.5, limit=1.0))


def test_errors() -> None:
    sentence = (
        "MaxNorm: limit was not given; it must be a number above 0. Write MaxNorm('*', 0.1, limit=...), or max_norm={'weight': 0.1, "
        "'limit': ...}."
    )
    refused(sentence, lambda: MaxNorm("*", 0.1))
    refused(sentence, lambda: graphreg.regularize(TwoLayers(), max_norm=0.1))
    refused("MaxNorm: limit=0 is not allowed; limit must be a number above 0.", lambda: MaxNorm("*", 0.1, limit=0))
