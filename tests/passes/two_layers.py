"""The model of the passes' tests: small enough for whole texts and for sums on paper."""

from __future__ import annotations

import torch
from torch import Tensor, nn

X = torch.tensor([[1.0, -2.0], [3.0, 0.5]])


class TwoLayers(nn.Module):
    """a: h = relu(x A), A = [[1, 0], [0, -1]]; b: y = h B, B = [2, 4]."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.act, self.b = nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False)
        with torch.no_grad():
            self.a.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, -1.0]]))
            self.b.weight.copy_(torch.tensor([[2.0, 4.0]]))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.act(self.a(x)))


def text(code: str) -> str:
    """The statements of a forward, without the releases of values that fx writes behind them."""
    return "\n".join(line.split(";")[0].strip() for line in code.strip().splitlines()[1:])


BEFORE = """a = self.a(x)
act = self.act(a)
b = self.b(act)
return b"""


def number(value: Tensor) -> float:
    return float(value.detach())
