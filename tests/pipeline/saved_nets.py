"""Models whose rewritten forms a new process loads: it imports this file, and little else."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Outputs(NamedTuple):
    logits: Tensor
    aux: Tensor


class Blocks(nn.Module):
    """Values that belong to submodules, a batch norm, activations in place."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(inplace=True))
        self.more = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.ReLU(inplace=True))
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x)
        return self.head(self.more(h) + h)


class Frozen(Blocks):
    """Keeps a batch norm in eval mode, whatever mode the model is put in."""

    def train(self, mode: bool = True) -> Frozen:
        super().train(mode)
        self.body[1].eval()
        return self


class Auxiliary(nn.Module):
    """Gives a named tuple in train mode, and a tensor in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.aux = nn.Linear(6, 5), nn.Linear(5, 3), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Any:
        h = torch.relu(self.body(x))
        return Outputs(self.head(h), self.aux(h)) if self.training else self.head(h)
