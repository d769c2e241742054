"""A perceptron of two layers, as small as a model that trains can be."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Perceptron(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hid, self.out = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.out(torch.relu(self.hid(x)))
        return y


def perceptron() -> Perceptron:
    torch.manual_seed(0)
    return Perceptron()
