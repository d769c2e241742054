"""One training run of the study: an over-large network on few digits, plain or regularized."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from sklearn.datasets import load_digits  # type: ignore[import-untyped]
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, dropout

import graphreg

TRAIN, VALIDATION, TEST = 200, 200, 1000
HIDDEN, STEPS, LEARNING_RATE = 512, 200, 3e-3
NEAR_ZERO, NOISE, OFF = 0.01, 0.3, 0.5


@dataclass(frozen=True)
class Job:
    """One network to train: the keywords for ``graphreg.regularize`` (none: plain) and a seed."""

    keywords: Mapping[str, Any]
    seed: int


@dataclass(frozen=True)
class Outcome:
    """What a trained network does, without any noise of its own. All in per cent, but the norm."""

    validation: float
    test: float
    half_off: float  # test accuracy while half of the hidden units are switched off at random
    noisy: float  # test accuracy on inputs with normal noise
    weight_norm: float
    near_zero: float  # share of activations at hidden sites that are (nearly) 0


@cache
def digits() -> tuple[Tensor, Tensor]:
    """Images [1797, 64] in [0, 1] and labels [1797], shuffled once and for all."""
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    return torch.tensor(data.data, dtype=torch.float32)[order] / 16, torch.tensor(data.target)[order]


def split(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows for training, validation and test.

    The test rows are the same for all seeds, so that no seed's validation split (which chooses strengths) meets them.
    """
    rest = TEST + torch.randperm(len(digits()[1]) - TEST, generator=torch.Generator().manual_seed(seed))
    return rest[:TRAIN], rest[TRAIN : TRAIN + VALIDATION], torch.arange(TEST)


def train(job: Job) -> nn.Sequential:
    """The network after STEPS steps on the whole training split: Adam, nothing else that regularizes."""
    images, labels = digits()
    rows = split(job.seed)[0]
    x, y = images[rows], labels[rows]
    torch.manual_seed(job.seed)  # the same initial weights whatever the keywords: differences to plain are paired
    net = nn.Sequential(nn.Linear(64, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 10))
    module = graphreg.regularize(net, rng=job.seed, **job.keywords)
    optimizer = torch.optim.Adam(module.parameters(), LEARNING_RATE, fused=True)
    for _ in range(STEPS):
        output, penalties = module(x)
        loss = cross_entropy(output, y) + sum(penalties.values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net  # it shares its layers with the regularized module, and has no additions


@torch.no_grad()
def measure(net: nn.Sequential, seed: int) -> Outcome:
    """Everything in plain torch, so that graphreg does not judge itself."""
    images, labels = digits()
    _, validation, test = split(seed)
    x, y = images[test], labels[test]
    first, second, head = net[:2], net[2:4], net[4]
    torch.manual_seed(1000 + seed)
    halved = head(dropout(second(dropout(first(x), OFF)), OFF))
    noisy = x + NOISE * torch.randn_like(x)
    activations = torch.stack([first(x), second(first(x))])
    weights = [p for p in net.parameters() if p.dim() > 1]
    return Outcome(
        validation=accuracy(net(images[validation]), labels[validation]),
        test=accuracy(net(x), y),
        half_off=accuracy(halved, y),
        noisy=accuracy(net(noisy), y),
        weight_norm=float(torch.stack([w.square().sum() for w in weights]).sum().sqrt()),
        near_zero=100 * float((activations.abs() < NEAR_ZERO).float().mean()),
    )


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Per cent."""
    return 100 * float((logits.argmax(1) == labels).float().mean())


def run(job: Job) -> Outcome:
    """Train and measure; a function of the job alone, so that it may run in any process."""
    return measure(train(job), job.seed)
