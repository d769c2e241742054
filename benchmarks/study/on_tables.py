"""Tables: a linear regression on columns that have twins, and a network on columns of which half mean nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from study.data import CANCER_TEST, DIABETES_TEST, TWINS, cancer, split, twins
from study.measures import accuracy
from study.training import Outcome, fit, minibatch

SMALL = 0.01  # a weight, or a column of weights, counts as removed below this share of the largest


def r_squared(predicted: Tensor, target: Tensor) -> float:
    return 1 - float((predicted - target).square().sum() / (target - target.mean()).square().sum())


def removed(sizes: Tensor) -> float:
    """The share of sizes that are below SMALL of the largest, in per cent."""
    return 100 * float((sizes < SMALL * sizes.max()).float().mean())


def regression(keywords: Mapping[str, Any], seed: int, steps: int = 500) -> Outcome:
    """The diabetes data, each of ten columns with three noisy copies; nn.Linear(40, 1), 80 rows, 500 steps of all rows, Adam from 1e-2."""
    x, y = twins()
    train, validation, test = split(len(y), DIABETES_TEST, 80, 160, seed)
    torch.manual_seed(seed)
    net = nn.Linear(x.shape[1], 1)
    fitted = fit(net, keywords, minibatch(x[train], y[train], len(train)), seed, steps=steps, rate=1e-2, loss=mse_loss)
    weights = net.weight.detach()[0]
    groups = weights.reshape(-1, TWINS + 1)
    return {
        "validation": 100 * r_squared(fitted(x[validation]), y[validation]),
        "explained": 100 * r_squared(fitted(x[test]), y[test]),
        "apart": float(groups.std(1).sum() / groups.abs().mean(1).sum()),
        "removed": removed(weights.abs()),
    }


def columns(keywords: Mapping[str, Any], seed: int, steps: int = 400) -> Outcome:
    """The breast cancer data, 30 columns and 30 that are shuffled; 60-32-2, ReLU, 200 rows, 400 steps of 50 rows, Adam from 3e-3."""
    x, y = cancer()
    train, validation, test = split(len(y), CANCER_TEST, 200, 160, seed)
    torch.manual_seed(seed)
    first = nn.Linear(x.shape[1], 32)
    net = nn.Sequential(first, nn.ReLU(), nn.Linear(32, 2))
    fitted = fit(net, keywords, minibatch(x[train], y[train], 50), seed, steps=steps, rate=3e-3)
    sizes = first.weight.detach().norm(dim=0)
    return {
        "validation": accuracy(fitted(x[validation]), y[validation]),
        "accuracy": accuracy(fitted(x[test]), y[test]),
        "removed": 100 * float((sizes[30:] < SMALL * sizes.max()).float().mean()),
        "kept": 100 * float((sizes[:30] >= SMALL * sizes.max()).float().mean()),
    }
