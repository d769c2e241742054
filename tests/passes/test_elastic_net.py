from __future__ import annotations

import torch
from torch import Tensor

from graphreg.passes import ElasticNet, WeightL1, WeightL2
from penalties import agrees, before_and_after, nothing_else_changes, of, on_parameters, random, refused, same_compiled


def test_before_and_after() -> None:
    before_and_after(on_parameters("elastic_net"), elastic_net=1.0)


def test_by_hand() -> None:
    """Of A: mean |w| = 2/4, mean w² = 2/4; of B: 6/2 and 20/2. All in all, |w| sums up to 8, w² to 22."""
    assert of(ElasticNet("*", 0.5)) == 0.5 * ((0.5 * 0.5 + 0.5 * 0.5 / 2) + (0.5 * 3 + 0.5 * 10 / 2)) / 2
    assert of(ElasticNet("*", 0.5, l1_ratio=0.25, reduction="sum")) == 0.5 * (0.25 * 8 + 0.75 * 22 / 2)


def test_the_ends_are_the_lasso_and_ridge_regression() -> None:
    assert of(ElasticNet("*", 0.5, l1_ratio=1)) == of(WeightL1("*", 0.5))
    assert of(ElasticNet("*", 0.5, l1_ratio=0)) == of(WeightL2("*", 0.5)) / 2


def test_against_norms_and_differences() -> None:
    def theirs(w: Tensor) -> Tensor:
        return 0.3 * torch.linalg.vector_norm(w, 1) + 0.7 / 2 * torch.linalg.vector_norm(w) ** 2

    agrees(ElasticNet("*", 1.0, l1_ratio=0.3, reduction="sum"), theirs, random(3, 2, 4))


def test_compiled() -> None:
    same_compiled(ElasticNet("*", 0.5))


def test_what_must_not_change() -> None:
    nothing_else_changes(ElasticNet("*", 0.5))


def test_errors() -> None:
    refused("ElasticNet: l1_ratio=2 is not allowed; l1_ratio must be a number in [0, 1].", lambda: ElasticNet("*", 1, l1_ratio=2))
    refused("ElasticNet: reduction='max' is not allowed; reduction must be 'mean' or 'sum'.", lambda: ElasticNet("*", 1, reduction="max"))
