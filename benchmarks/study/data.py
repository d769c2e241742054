"""The data, all of it from scikit-learn's wheel, and how it is split.

The test rows are the same for every seed. A seed chooses the rows for training and validation among the others, so that no strength is
chosen on a test row.
"""

from __future__ import annotations

from functools import cache

import numpy
import torch
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits  # type: ignore[import-untyped]
from torch import Tensor

DIGITS_TEST, DIABETES_TEST, CANCER_TEST = 1000, 200, 200
TWINS, TWIN_NOISE = 3, 0.3

Split = tuple[Tensor, Tensor, Tensor]


def shuffled(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The rows in an order that is always the same."""
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    return x[order], y[order]


def split(total: int, test: int, train: int, validation: int, seed: int) -> Split:
    """Rows for training, validation and test."""
    rest = test + torch.randperm(total - test, generator=torch.Generator().manual_seed(seed))
    assert train + validation <= len(rest)
    return rest[:train], rest[train : train + validation], torch.arange(test)


def standardized(x: Tensor) -> Tensor:
    return (x - x.mean(0)) / x.std(0)


@cache
def digits() -> tuple[Tensor, Tensor]:
    """Images [1797, 64] in [0, 1] and labels [1797]."""
    data = load_digits()
    return shuffled(torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target))


def digits_split(seed: int, train: int = 200, validation: int = 300) -> Split:
    return split(len(digits()[1]), DIGITS_TEST, train, validation, seed)


@cache
def twins() -> tuple[Tensor, Tensor]:
    """The diabetes data: its ten columns, each with TWINS noisy copies beside it [442, 40], and the standardized target [442, 1]."""
    data = load_diabetes()
    x = standardized(torch.tensor(data.data, dtype=torch.float32))
    copies = torch.stack([x, *(x + TWIN_NOISE * normal(x.shape, place) for place in range(TWINS))], 2).flatten(1)
    return shuffled(standardized(copies), standardized(torch.tensor(data.target, dtype=torch.float32)).unsqueeze(1))


@cache
def cancer() -> tuple[Tensor, Tensor]:
    """The breast cancer data: its 30 columns, then the same columns with their rows permuted [569, 60], and the labels [569]."""
    data = load_breast_cancer()
    x = standardized(torch.tensor(data.data, dtype=torch.float32))
    orders = numpy.random.default_rng(0).permuted(numpy.tile(numpy.arange(len(x)), (x.shape[1], 1)), axis=1)
    meaningless = x.gather(0, torch.tensor(orders).T)
    return shuffled(torch.cat([x, meaningless], 1), torch.tensor(data.target))


def normal(shape: torch.Size, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
