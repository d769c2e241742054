"""A model for tests of the source listing, which know its line numbers: no line may move."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def decorated(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return wrapper


def twice(x: Tensor) -> Tensor:
    return x * 2


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.act = nn.Linear(8, 8), nn.ReLU()

    @decorated
    def forward(self, x: Tensor) -> Tensor:
        """Add a branch.

        This text is left out of the listing.
        """
        h = self.act(self.fc(x))
        return x + h


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.rnn, self.head = nn.Linear(4, 8), nn.LSTM(8, 8, batch_first=True), nn.Linear(8, 2)
        self.blocks = nn.Sequential(Block(), Block(), Block())
        self.scale = nn.Parameter(torch.ones(8))

    def features(self, x: Tensor) -> Tensor:
        out, (h, _) = self.rnn(
            torch.relu(self.stem(x)),
        )
        return self.blocks(out + h[0][:, None] * self.scale)

    def forward(
        self,
        x: Tensor,
        more: Tensor,
    ) -> Tensor:
        x = self.features(x)
        shift = lambda z: z + more  # noqa: E731
        return self.head(twice(shift(x)))
