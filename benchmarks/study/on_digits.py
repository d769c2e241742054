"""Networks that classify digits from few examples."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from study.data import digits, digits_split, normal
from study.measures import accuracy, attacked, calibration_error, closed_gates, correlation, entropy, halved
from study.training import Fitted, Outcome, fit, minibatch

BATCH, NOISE, ATTACK = 50, 0.3, 0.1
EARLY = 60  # the step near which the loss says how fast a deep network trains


def few(keywords: Mapping[str, Any], seed: int, steps: int = 250) -> Outcome:
    """64-256-256-10, ReLU, 200 images, 250 steps of 50 images, Adam from 3e-3."""
    x, y = digits()
    train, validation, test = digits_split(seed)
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
    fitted = fit(net, keywords, minibatch(x[train], y[train], BATCH), seed, steps=steps, rate=3e-3)
    with torch.no_grad():
        first = net[:2](x[test])
        hidden = torch.cat([first, net[2:4](first)], 1)
        pruned = accuracy(halved(net)(x[test]), y[test])
    logits, train_accuracy = fitted(x[test]), accuracy(fitted(x[train]), y[train])
    return scores(fitted, validation, test) | {
        "gap": train_accuracy - accuracy(logits, y[test]),
        "entropy": entropy(logits),
        "calibration": calibration_error(logits, y[test]),
        "noisy": accuracy(fitted(x[test] + NOISE * normal(x[test].shape, 1000 + seed)), y[test]),
        "attacked": attacked(fitted, x[test], y[test], ATTACK),
        "zeros": 100 * float((hidden == 0).float().mean()),
        "correlation": (correlation(hidden[:, :256]) + correlation(hidden[:, 256:])) / 2,
        "log_z": float(logits.logsumexp(1).abs().mean()),
        "closed": closed_gates(fitted.module),
        "pruned": pruned,
    }


def scores(fitted: Fitted, validation: Tensor, test: Tensor) -> Outcome:
    """The accuracies that every network has."""
    x, y = digits()
    return {"validation": accuracy(fitted(x[validation]), y[validation]), "accuracy": accuracy(fitted(x[test]), y[test])}


def maps(keywords: Mapping[str, Any], seed: int, steps: int = 250) -> Outcome:
    """Convolutions of 16, 32 and 64 channels, 3 x 3, ReLU, a max pooling to 4 x 4 before the third; 200 images, 250 steps of 32, 3e-3."""
    x, y = digits()
    train, validation, test = digits_split(seed)
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64 * 16, 10)),
    )
    fitted = fit(net, keywords, minibatch(x[train], y[train], 32), seed, steps=steps, rate=3e-3)
    return scores(fitted, validation, test)


class Block(nn.Module):
    """A residual block: normalize, widen, ReLU, narrow."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.wide, self.back = nn.LayerNorm(width), nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        branch: Tensor = self.back(self.wide(self.norm(x)).relu())
        return x + branch


class Residual(nn.Module):
    """16 residual blocks between two linear layers."""

    def __init__(self, depth: int = 16, width: int = 64) -> None:
        super().__init__()
        self.first, self.blocks = nn.Linear(64, width), nn.Sequential(*(Block(width) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(self.blocks(self.first(x))))
        return logits

    def without_every_other(self, x: Tensor) -> Tensor:
        """The logits of the half of the blocks that Fan et al. keep."""
        logits: Tensor = self.head(self.norm(self.blocks[::2](self.first(x))))
        return logits


def deep(keywords: Mapping[str, Any], seed: int, steps: int = 300) -> Outcome:
    """16 residual blocks of width 64 (layer norm, linear, ReLU, linear), 200 images, 300 steps of 50 images, Adam from 1e-3."""
    x, y = digits()
    train, validation, test = digits_split(seed)
    torch.manual_seed(seed)
    net = Residual()
    fitted = fit(net, keywords, minibatch(x[train], y[train], BATCH), seed, steps=steps, rate=1e-3)
    with torch.no_grad():
        return scores(fitted, validation, test) | {"pruned": accuracy(net.without_every_other(x[test]), y[test])}


class PostNorm(nn.Module):
    """A residual block of torchvision's ResNets: convolve, normalize, ReLU, convolve, normalize, add, ReLU."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.conv2, self.norm2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        branch: Tensor = self.norm2(self.conv2(self.norm1(self.conv1(x)).relu()))
        return (x + branch).relu()


class PreNorm(PostNorm):
    """A residual block of Wide ResNets: normalize, ReLU, convolve, twice, and add."""

    def forward(self, x: Tensor) -> Tensor:
        branch: Tensor = self.conv2(self.norm2(self.conv1(self.norm1(x).relu())).relu())
        return x + branch


def residual(keywords: Mapping[str, Any], seed: int, steps: int, block: type[PostNorm], channels: int = 32) -> Outcome:
    """Eight residual blocks of convolutions on maps of 4 x 4."""
    x, y = digits()
    train, validation, test = digits_split(seed)
    torch.manual_seed(seed)
    normalized = nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU())
    before, behind = (normalized, nn.Identity()) if block is PostNorm else (nn.Identity(), normalized)
    parts = OrderedDict[str, nn.Module](
        image=nn.Unflatten(1, (1, 8, 8)), stem=nn.Conv2d(1, channels, 3, stride=2, padding=1), before=before,
        blocks=nn.Sequential(*(block(channels) for _ in range(8))), behind=behind,
        pool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten(), head=nn.Linear(channels, 10),
    )  # fmt: skip
    fitted = fit(nn.Sequential(parts), keywords, minibatch(x[train], y[train], BATCH), seed, steps=steps, rate=3e-3)
    return scores(fitted, validation, test)


def resnet(keywords: Mapping[str, Any], seed: int, steps: int = 150) -> Outcome:
    """A convolution to 32 maps of 4 x 4, batch norm, ReLU, eight residual blocks as in torchvision's ResNets (convolution, batch norm,
    ReLU, convolution, batch norm, sum, ReLU), the mean of each map, a linear layer; 200 images, 150 steps of 50, Adam from 3e-3."""
    return residual(keywords, seed, steps, PostNorm)


def wide(keywords: Mapping[str, Any], seed: int, steps: int = 150) -> Outcome:
    """As resnet, but with the blocks of Wide ResNets (batch norm, ReLU, convolution, batch norm, ReLU, convolution, sum), and with a batch
    norm and a ReLU after the last block; 200 images, 150 steps of 50, Adam from 3e-3."""
    return residual(keywords, seed, steps, PreNorm)


class Standardize(nn.Module):
    """Gives each pixel the mean 0 and the standard deviation 1 on the training images; constant pixels become 0."""

    mean: Tensor
    std: Tensor

    def __init__(self, images: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", images.mean(0))
        self.register_buffer("std", images.std(0).clamp(min=0.05))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


def chain(keywords: Mapping[str, Any], seed: int, steps: int, activation: type[nn.Module]) -> Outcome:
    """Eight hidden layers of width 64 in a row."""
    x, y = digits()
    train, validation, test = digits_split(seed)
    torch.manual_seed(seed)
    layers = [nn.Linear(64, 64) for _ in range(8)]
    if activation is nn.SELU:
        for layer in layers:
            nn.init.normal_(layer.weight, std=1 / math.sqrt(layer.in_features))
            nn.init.zeros_(layer.bias)
    chained = (part for layer in layers for part in (layer, activation()))
    net = nn.Sequential(Standardize(x[train]), *chained, nn.Linear(64, 10))
    fitted = fit(net, keywords, minibatch(x[train], y[train], BATCH), seed, steps=steps, rate=1e-3)
    return scores(fitted, validation, test) | {"early": sum(fitted.losses[EARLY - 10 : EARLY]) / 10}


def selu(keywords: Mapping[str, Any], seed: int, steps: int = 300) -> Outcome:
    """Standardized pixels, eight hidden SELU layers of width 64, LeCun's initialization, 200 images, 300 steps of 50, Adam from 1e-3."""
    return chain(keywords, seed, steps, nn.SELU)


def plain_chain(keywords: Mapping[str, Any], seed: int, steps: int = 300) -> Outcome:
    """Standardized pixels, eight hidden ReLU layers of width 64, torch's initialization, 200 images, 300 steps of 50, Adam from 1e-3."""
    return chain(keywords, seed, steps, nn.ReLU)
