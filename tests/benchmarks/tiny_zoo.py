"""A zoo of the tests' own: what passes, what raises, what hangs, what dies, what leaves, what asks for too much memory."""

from __future__ import annotations

import os
import sys
import time

import torch
from torch import Tensor, nn

from zoo.providers import Inputs, Provider


class Perceptron(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hid, self.out = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.dropout(torch.relu(self.hid(x)), 0.1, self.training))


class Branching(Perceptron):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.sum() > 0 else -x)


def build(name: str) -> tuple[nn.Module, Inputs]:
    if name == "raises":
        raise ValueError("it wants 5 channels\nand more")
    if name == "hangs":
        time.sleep(60)
    if name == "dies":
        os.kill(os.getpid(), 9)
    if name == "leaves":
        sys.exit(3)
    if name == "fills":
        torch.empty(2**40)
    return (Branching if name == "branches" else Perceptron)(), (torch.ones(2, 4),)


def names() -> dict[str, str]:
    return dict.fromkeys(("passes", "branches", "raises", "hangs", "dies", "leaves", "fills"), "")


INTRODUCTION = "# Models\n\n{tiny} models of the tests' own."
PACKAGES, PRELOADED, INDUCTOR = ("torch",), ("torch",), ()
PROVIDERS = {"tiny": Provider(names, build)}
