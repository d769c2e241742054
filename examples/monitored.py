"""Digits learned under a monitor, with a rate of dropout that is too high for the second layer: python examples/monitored.py"""

from __future__ import annotations

from collections import OrderedDict

import torch
from show import Screen, table
from sklearn.datasets import load_digits
from torch import nn

import graphreg

STEPS, EVERY = 301, 100


def main() -> None:
    digits = load_digits()
    x, y = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
    torch.manual_seed(0)
    layers = [
        ("first", nn.Linear(64, 32)),
        ("relu", nn.ReLU()),
        ("second", nn.Linear(32, 32)),
        ("tanh", nn.Tanh()),
        ("out", nn.Linear(32, 10)),
    ]
    module = graphreg.regularize(nn.Sequential(OrderedDict(layers)), rng=0, dropout={"relu": 0.1, "tanh": 0.6}, hidden_l1=0.1)
    optimizer = torch.optim.SGD(module.parameters(), 0.3)
    seen: dict[str, dict[int, float]] = {}
    with graphreg.monitor(module, every=EVERY, log=lambda name, value, step: seen.setdefault(name, {}).update({step: value})):
        for _ in range(STEPS):
            output, penalties = module(x)
            loss = nn.functional.cross_entropy(output, y) + sum(penalties.values())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    steps = [str(step) for step in range(0, STEPS, EVERY)]
    Screen().line(table([["step", *steps], *([name, *(f"{value:.3g}" for value in values.values())] for name, values in seen.items())]))


if __name__ == "__main__":
    main()
