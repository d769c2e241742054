"""Functions that a trace cannot see into, as libraries have them. A file of its own, because they must be importable by name."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

WEIGHT = torch.ones(4)
LAYER = nn.Linear(4, 4)
CALLS = 0


def groups(index: Tensor) -> int:
    return int(index.max()) + 1


def pool(x: Tensor, index: Tensor) -> Tensor:
    """It calls another function that cannot be traced."""
    return x.new_zeros(groups(index), x.shape[1]).index_add_(0, index, x)


class Pools(nn.Module):
    """A module of the same package as the functions."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        return pool(self.layer(x), index)


def is_sorted(index: Tensor) -> bool:
    return bool((index.diff() >= 0).all())


def sorted_first(x: Tensor, index: Tensor) -> Tensor:
    """It branches on what a function returns that cannot be traced either."""
    return x if is_sorted(index) else x[index.argsort()]


def scaled(x: Tensor, index: Tensor) -> Tensor:
    """It reaches a tensor that is no argument."""
    return x[: groups(index)] * WEIGHT


def through_layer(layer: nn.Module, x: Tensor, index: Tensor) -> Tensor:
    """It gets a module."""
    return layer(x[: groups(index)])


def rows(x: Tensor, index: Tensor) -> Iterator[Tensor]:
    for i in range(int(index.max())):
        yield x[i]


def halved(x: Tensor, index: Tensor) -> Tensor:
    """It branches on a size."""
    return x[: x.shape[0] // 2] if x.shape[0] % 2 == 0 else x


def counted(x: Tensor, index: Tensor) -> Tensor:
    """It changes a global variable."""
    global CALLS  # noqa: PLW0603  # as a library that counts
    CALLS += 1
    return x[: groups(index)]


def written(x: Tensor, index: Tensor) -> Tensor:
    """It writes into its argument."""
    x[groups(index) - 1] = 0.0
    return x


def decorated(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(function)
    def called(*args: Tensor) -> Tensor:
        return function(*args) + 1.0

    return called


@decorated
def shifted(x: Tensor, index: Tensor) -> Tensor:
    return x[: groups(index)]


def scaled_by(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(function)
    def inner(x: Tensor, index: Tensor) -> Tensor:
        return function(x, index) * float(index.max())

    return inner


@scaled_by
def kept(x: Tensor, index: Tensor) -> Tensor:
    return x


@scaled_by
def negated(x: Tensor, index: Tensor) -> Tensor:
    return -x


def mask_of(index: Tensor, rows: int) -> Tensor | None:
    """It returns None for some values."""
    return None if int(index.max()) == rows else index > 1


def noting(x: Tensor, notes: list[Tensor]) -> Tensor:
    """It changes a list of its caller's."""
    if x.detach().max() > 1:
        notes.append(x.mean())
    return x * 2


class Settings:
    factor = 1


SETTINGS = Settings()
SETTINGS.factor = 1


def setting(x: Tensor) -> Tensor:
    """It changes an object that others read."""
    if x.detach().max() > 1:
        SETTINGS.factor = 2
    return x * 2
