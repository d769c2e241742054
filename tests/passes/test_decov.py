from __future__ import annotations

import torch
from torch import Tensor

import graphreg
from graphreg.passes import DeCov
from penalties import agrees, before_and_after, nothing_else_changes, of, on_values, random, refused, same_compiled
from two_layers import TwoLayers, X


def test_before_and_after() -> None:
    before_and_after(on_values("decov"), decov=1.0)


def test_by_hand() -> None:
    """h = [[1, 2], [3, 0]] less its mean is [[-1, 1], [1, -1]]: C = [[1, -1], [-1, 1]], half of two ones off the diagonal."""
    assert of(DeCov("act", 0.5)) == 0.5


def test_against_torch_and_differences() -> None:
    def theirs(units: Tensor) -> Tensor:
        covariance = torch.cov(units.T, correction=0)
        return (torch.linalg.matrix_norm(covariance) ** 2 - torch.linalg.vector_norm(covariance.diagonal()) ** 2) / 2

    agrees(DeCov("*", 1.0), theirs, random(5, 3))


def test_compiled() -> None:
    same_compiled(DeCov("*", 0.5))


def test_what_must_not_change() -> None:
    nothing_else_changes(DeCov("*", 0.5))


def test_errors() -> None:
    refused(
        "DeCov at act: the value has shape (1, 2), and so 1 sample of 2 units (the units are the last axis); the penalty needs 2 samples "
        "or more. Give a larger batch (drop_last=True in a DataLoader); graphreg.strip(module) gives the model without penalties, for "
        "single examples.",
        lambda: graphreg.regularize(TwoLayers(), decov=0.1)(X[:1]),
    )
    refused("DeCov at b: the value has shape (2, 1), and so 1 unit (the units are the last axis); the penalty needs 2 or more. Give "
            "axis= where another axis has the units, or leave the value out by '!'.",
            lambda: graphreg.regularize(TwoLayers(), DeCov("b", 0.1), example_inputs=X))  # fmt: skip
