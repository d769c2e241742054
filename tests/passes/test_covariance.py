from __future__ import annotations

import torch
from torch import Tensor

import graphreg
from graphreg.passes import Covariance
from penalties import agrees, before_and_after, nothing_else_changes, of, on_values, random, refused, same_compiled
from two_layers import TwoLayers, X


def test_before_and_after() -> None:
    before_and_after(on_values("covariance"), covariance=1.0)


def test_by_hand() -> None:
    """h = [[1, 2], [3, 0]] less its mean is [[-1, 1], [1, -1]]: C = [[2, -2], [-2, 2]], two fours off the diagonal of two units."""
    assert of(Covariance("act", 0.5)) == 0.5 * 4


def test_against_torch_and_differences() -> None:
    def theirs(units: Tensor) -> Tensor:
        covariance = torch.cov(units.T)
        return covariance[~torch.eye(3, dtype=torch.bool)].square().sum() / 3

    agrees(Covariance("*", 1.0), theirs, random(5, 3))


def test_compiled() -> None:
    same_compiled(Covariance("*", 0.5))


def test_what_must_not_change() -> None:
    nothing_else_changes(Covariance("*", 0.5))


def test_errors() -> None:
    refused("Covariance at act: the value has shape (1, 2), and so 1 sample of 2 units",
            lambda: graphreg.regularize(TwoLayers(), covariance=0.1)(X[:1]))  # fmt: skip
