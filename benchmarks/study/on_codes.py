"""Representations: an autoencoder, two views of each image, and weights that are carried to another task."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, linear, mse_loss

from study.data import digits, digits_split
from study.measures import accuracy, probe
from study.training import Outcome, fit, minibatch

UNLABELLED, LABELLED, TARGET = 500, 100, 0.05
VIEW_NOISE = 0.3
NEW_CLASS, NEW_TRAIN, NEW_VALIDATION = 5, 25, 100  # the new task's first class, and its images


class Autoencoder(nn.Module):
    """A sigmoid layer that is wider than the image, decoded by the transpose of its weights."""

    def __init__(self, units: int = 128) -> None:
        super().__init__()
        self.encode, self.shift = nn.Linear(64, units), nn.Parameter(torch.zeros(64))

    def code(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.encode(x))

    def forward(self, x: Tensor) -> Tensor:
        return linear(self.code(x), self.encode.weight.T, self.shift)


def cross_entropy_of_pixels(logits: Tensor, pixels: Tensor) -> Tensor:
    """Summed over the pixels, averaged over the images, as Rifai et al. have it."""
    return binary_cross_entropy_with_logits(logits, pixels, reduction="none").sum(1).mean()


def autoencoder(keywords: Mapping[str, Any], seed: int, steps: int = 400) -> Outcome:
    """64-128-64, sigmoid, tied weights, 500 images without labels, 400 steps of 100 images, Adam from 3e-3.

    Then a logistic regression on the codes of 100 of the images.
    """
    x, y = digits()
    train, validation, test = digits_split(seed, UNLABELLED, 297)
    torch.manual_seed(seed)
    net = Autoencoder()
    fitted = fit(net, keywords, minibatch(x[train], x[train], 100), seed, steps=steps, rate=3e-3, loss=cross_entropy_of_pixels)
    with torch.no_grad():
        codes = {name: net.code(x[rows]) for name, rows in {"few": train[:LABELLED], "validation": validation, "test": test}.items()}
        slopes = (codes["test"] * (1 - codes["test"])).square()  # the Jacobian of a sigmoid layer, by hand
        jacobian = (slopes @ net.encode.weight.square().sum(1)).mean().sqrt()
    chosen, final = probe((codes["few"], y[train[:LABELLED]]), (codes["validation"], y[validation]), (codes["test"], y[test]))
    return {
        "validation": chosen,
        "accuracy": final,
        "jacobian": float(jacobian),
        "off_target": float((codes["test"].mean(0) - TARGET).abs().mean()),
        "reconstruction": float(cross_entropy_of_pixels(fitted(x[test]), x[test])),
    }


def two_views(x: Tensor, generator: torch.Generator) -> Tensor:
    """Two views of each image, one behind the other: shifted by a pixel or not, with noise. The batch is twice as long."""
    views = []
    for _ in range(2):
        down, right = (int(torch.randint(-1, 2, (), generator=generator)) for _ in range(2))
        moved = x.reshape(-1, 8, 8).roll((down, right), (1, 2)).flatten(1)
        views.append(moved + VIEW_NOISE * torch.randn(x.shape, generator=generator))
    return torch.cat(views)


def views(keywords: Mapping[str, Any], seed: int, steps: int = 300) -> Outcome:
    """64-128-32, ReLU; the loss is the mean squared difference between the embeddings of two views of an image: noise, a shift by a pixel.

    500 images without labels, 300 steps of 100 images, Adam from 3e-3. Then a logistic regression on the embeddings of 100 of the images.
    """
    x, y = digits()
    train, validation, test = digits_split(seed, UNLABELLED, 297)
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 32))

    def draw(generator: torch.Generator) -> tuple[Tensor, None]:
        rows = train[torch.randperm(len(train), generator=generator)[:100]]
        return two_views(x[rows], generator), None

    def distance(embeddings: Tensor, _: None) -> Tensor:
        first, second = embeddings.chunk(2)
        return mse_loss(first, second)

    fitted = fit(net, keywords, draw, seed, steps=steps, rate=3e-3, loss=distance)
    few = (fitted(x[train[:LABELLED]]), y[train[:LABELLED]])
    chosen, final = probe(few, (fitted(x[validation]), y[validation]), (fitted(x[test]), y[test]))
    return {"validation": chosen, "accuracy": final, "spread": float(fitted(x[test]).std(0).mean())}


class Transferred(nn.Module):
    """A body that is carried over, and a head that is new."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU())
        self.head = nn.Linear(128, 5)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(x))
        return logits


@cache
def pretrained(seed: int, steps: int) -> Transferred:
    """Trained on the digits 0 to 4 that are no test images."""
    x, y = digits()
    train, _, _ = digits_split(seed, 797, 0)
    rows = train[y[train] < NEW_CLASS]
    torch.manual_seed(seed)
    net = Transferred()
    fit(net, {}, minibatch(x[rows], y[rows], 50), seed, steps=steps, rate=3e-3)
    return net


def transfer(keywords: Mapping[str, Any], seed: int, steps: int = 300) -> Outcome:
    """64-128-128, ReLU, trained on the digits 0 to 4; then, with a new head, on 25 images of 5 to 9, 300 steps of all, Adam from 3e-3."""
    x, y = digits()
    train, _, test = digits_split(seed, 797, 0)
    new = train[y[train] >= NEW_CLASS]
    few, validation, test = new[:NEW_TRAIN], new[NEW_TRAIN : NEW_TRAIN + NEW_VALIDATION], test[y[test] >= NEW_CLASS]
    net = copy.deepcopy(pretrained(seed, steps))
    start = copy.deepcopy(net.body.state_dict())
    torch.manual_seed(seed)
    net.head.reset_parameters()
    fitted = fit(net, keywords, minibatch(x[few], y[few] - NEW_CLASS, NEW_TRAIN), seed, steps=steps, rate=3e-3)
    moved = sum(float((now - start[name]).square().sum()) for name, now in net.body.state_dict().items())
    return {
        "validation": accuracy(fitted(x[validation]), y[validation] - NEW_CLASS),
        "accuracy": accuracy(fitted(x[test]), y[test] - NEW_CLASS),
        "moved": moved**0.5,
    }
