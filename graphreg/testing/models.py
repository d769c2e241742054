"""Small models with inputs, on which ``check_regularizer`` checks regularizers: a perceptron, a convolution, a recurrent model, …

The docstring of each model lists its sites: the names of the values that a regularizer can act on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SEED = 2718


@dataclass(frozen=True)
class Example:
    """A model, with the inputs of a call.

    Attributes:
        model: The model.
        inputs: The arguments of a call, as ``example_inputs`` of ``graphreg.regularize``.
    """

    model: nn.Module
    inputs: Any


def perceptron() -> Example:
    """Return a perceptron. Sites: 0, 1 (a sigmoid), 2."""
    return Example(nn.Sequential(nn.Linear(4, 6), nn.Sigmoid(), nn.Linear(6, 3)), torch.randn(5, 4))


class TokenReader(nn.Module):
    """Embeds tokens and runs a recurrent layer. Sites: word, rnn, head."""

    def __init__(self) -> None:
        super().__init__()
        self.word, self.rnn, self.head = nn.Embedding(9, 4), nn.GRU(4, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.rnn(self.word(ids))[0])  # type: ignore[no-any-return]


class Loop(nn.Module):
    """Calls a recurrent cell three times. Sites: cell, cell_1, cell_2 (the calls of the cell), head."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.GRUCell(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.cell(x)
        for _ in range(2):
            h = self.cell(x, h)
        return self.head(h)  # type: ignore[no-any-return]


class Residual(nn.Module):
    """Has a residual branch. Sites: inner, act, outer (the branch), add (the sum), head."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.act, self.outer, self.head = nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.outer(self.act(self.inner(x))))  # type: ignore[no-any-return]


class Attention(nn.Module):
    """Computes attention with two heads. Sites: query, key, value, scaled_dot_product_attention, head."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.head = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (2, 2)).transpose(1, 2) for layer in (self.query, self.key, self.value))
        return self.head(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class Padded(nn.Module):
    """Reads padded sequences. Sites: body, tanh, head. The inputs ``mask``, ``lengths`` and ``labels`` are for formulas alone."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor, mask: Tensor, lengths: Tensor, labels: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x)))  # type: ignore[no-any-return]


def padded() -> Example:
    """Return a ``Padded`` with the inputs x [batch, time, 4], mask [batch, time] bool, lengths [batch] and labels [batch], int64."""
    lengths = torch.tensor([5, 1, 3])
    return Example(Padded(), (torch.randn(3, 5, 4), torch.arange(5) < lengths[:, None], lengths, torch.tensor([2, 0, 1])))


def convolution() -> Example:
    """Return a convolutional model. Sites: 0 and 2 (2d convolutions), 1 (an activation), 3 (a flatten), 4."""
    model = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, 2, 1), nn.Flatten(), nn.Linear(2 * 64, 3))
    return Example(model, torch.randn(3, 1, 8, 8))


MADE: tuple[Callable[[], Example], ...] = (
    perceptron,
    convolution,
    lambda: Example(TokenReader(), torch.tensor([[0, 1, 2, 3], [4, 5, 6, 8], [1, 1, 7, 0]])),
    lambda: Example(Loop(), torch.randn(5, 4)),
    lambda: Example(Residual(), torch.randn(5, 4)),
    lambda: Example(Attention(), torch.randn(3, 4, 4)),
    padded,
)


def examples() -> Iterator[Example]:
    """Yield the models, with the same parameters and inputs each time. The state of torch's random generator stays unchanged."""
    for make in MADE:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            example = make()
        yield example
