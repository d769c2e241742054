"""Recurrent networks that read a digit row by row: eight steps of eight pixels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from study.data import digits, digits_split
from study.on_digits import BATCH, scores
from study.training import Outcome, fit, minibatch


class Cells(nn.Module):
    """An LSTM cell in a loop; the last state is classified."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.cell, self.head, self.width = nn.LSTMCell(8, width), nn.Linear(width, 10), width

    def forward(self, x: Tensor) -> Tensor:
        h = c = x.new_zeros(x.shape[0], self.width)
        for step in range(8):
            h, c = self.cell(x[:, 8 * step : 8 * step + 8], (h, c))
        logits: Tensor = self.head(h)
        return logits


class Layers(nn.Module):
    """Two LSTM layers; the mean over time of what the second returns is classified."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.first, self.second = nn.LSTM(8, width, batch_first=True), nn.LSTM(width, width, batch_first=True)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        first, _ = self.first(x.reshape(-1, 8, 8))
        second, _ = self.second(first)
        logits: Tensor = self.head(second.mean(1))
        return logits


def recurrent(net: type[nn.Module], keywords: Mapping[str, Any], seed: int, steps: int) -> Outcome:
    x, y = digits()
    train, validation, test = digits_split(seed)
    torch.manual_seed(seed)
    fitted = fit(net(), keywords, minibatch(x[train], y[train], BATCH), seed, steps=steps, rate=3e-3)
    return scores(fitted, validation, test)


def cells(keywords: Mapping[str, Any], seed: int, steps: int = 300) -> Outcome:
    """An nn.LSTMCell of 64 units over the eight rows of a digit, 200 images, 300 steps of 50 images, Adam from 3e-3."""
    return recurrent(Cells, keywords, seed, steps)


def lstm(keywords: Mapping[str, Any], seed: int, steps: int = 300) -> Outcome:
    """Two nn.LSTM of 64 units over the eight rows of a digit, their mean over time, 200 images, 300 steps of 50 images, Adam from 3e-3."""
    return recurrent(Layers, keywords, seed, steps)
