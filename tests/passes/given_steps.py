"""The models of the recurrent penalties' tests: a value that is given, 2 x 3 x 2, and a cell called three times."""

from __future__ import annotations

import torch
from torch import Tensor, nn

# Norms of the steps: 5, 0, 1 in the first sequence (with a zero state), 1, 3, 5 in the second.
Z = torch.tensor([[[3.0, 4.0], [0.0, 0.0], [1.0, 0.0]], [[0.0, 1.0], [0.0, 3.0], [4.0, 3.0]]])
ONES = torch.ones(2, 3, 2)


class Given(nn.Module):
    """``mul`` is the value, [batch 2, time 3, units 2]: for an input of ones, the parameter z itself."""

    def __init__(self, z: Tensor = Z) -> None:
        super().__init__()
        self.z, self.head = nn.Parameter(z.clone()), nn.Linear(z.shape[-1], 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x * self.z)


class GivenWithLengths(Given):
    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        return self.head(x * self.z)


class Doubling(nn.Module):
    """h' = 2 h + x."""

    def __init__(self) -> None:
        super().__init__()
        self.twice = nn.Linear(2, 2, bias=False)
        with torch.no_grad():
            self.twice.weight.copy_(2 * torch.eye(2))

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return self.twice(h) + x


class Unrolled(nn.Module):
    """A cell called three times, on [batch, 3, 2]."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = Doubling(), nn.Linear(2, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = x[:, 0] * 0
        for t in range(3):
            h = self.cell(x[:, t], h)
        return self.head(h)
