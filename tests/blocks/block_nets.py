"""Small models with blocks, each with a selector of its blocks and the arguments of a call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

import graphreg


class Residual(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.norm, self.up, self.drop, self.down = nn.LayerNorm(width), nn.Linear(width, 16), nn.Dropout(0.2), nn.Linear(16, width)
        self.gain = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = x + self.gain * self.down(self.drop(torch.relu(self.up(self.norm(x)))))
        return h


class Stack(nn.Module):
    """A plain stack of equal blocks."""

    def __init__(self, depth: int = 3, width: int = 8) -> None:
        super().__init__()
        self.layers, self.head = nn.ModuleList(Residual(width) for _ in range(depth)), nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        y: Tensor = self.head(x)
        return y


class Twice(Stack):
    """The first block is called twice."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers[0](super().forward(x).repeat(1, 2))
        return y


class Skips(nn.Module):
    """A U-Net: blocks read what earlier blocks computed inside, by way of the output or past it."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2 = _Down(3, 4), _Down(4, 8)
        self.up1, self.up2 = _Up(8, 4), _Up(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        first, one = self.down1(x)
        second, two = self.down2(first)
        y: Tensor = self.up2(self.up1(second, two), one)
        return y


class _Down(nn.Module):
    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(inner, outer, 3, padding=1), nn.BatchNorm2d(outer)
        self.pool = nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.relu(self.norm(self.conv(x)))
        return self.pool(y), y


class _Up(nn.Module):
    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        self.lift, self.conv = nn.ConvTranspose2d(inner, inner, 2, stride=2), nn.Conv2d(2 * inner, outer, 3, padding=1)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return torch.relu(self.conv(torch.cat([self.lift(x), skip], 1)))


class Named(nn.Module):
    """Blocks pass dicts and nested tuples to each other."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = _Dicts(), _Tuples()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> dict[str, Any]:
        return {"y": self.second(self.first(x, mask=mask), x), "x": x}


class _Dicts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> dict[str, Any]:
        y = torch.tanh(self.a(x))
        return {"y": y, "both": (y, torch.tanh(self.b(x)))}


class _Tuples(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c = nn.Linear(8, 8)

    def forward(self, values: dict[str, Any], x: Tensor) -> Tensor:
        y: Tensor = torch.relu(self.c(values["both"][1] + values["y"] * x))
        return y


class SharedInside(nn.Module):
    """Both blocks have the same linear layer, and use a scale that the whole model has, and a buffer of the first block."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((8,), 0.5))
        self.register_buffer("shift", torch.full((8,), 0.1))
        common = nn.Linear(8, 8)
        self.layers = nn.ModuleList([_Sharing(common), _Sharing(common)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, self.scale, self.shift)
        return x * self.layers[0].own


class _Sharing(nn.Module):
    def __init__(self, common: nn.Linear) -> None:
        super().__init__()
        self.common, self.own = common, nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return torch.relu(self.common(x) * scale + shift) * self.own


class TwoGraphs(Stack):
    """Its structure differs between train and eval mode, within blocks and outside."""

    def __init__(self) -> None:
        super().__init__(2)
        self.extra = _ModeOnly()

    def forward(self, x: Tensor) -> Tensor:
        y = self.extra(super().forward(self.extra(x)).repeat(1, 2))
        return y.sigmoid() if self.training else y


class _ModeOnly(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.relu(self.fc(x))
        return y + x if self.training else y


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList([nn.Sequential(Residual(), Residual()), nn.Sequential(Residual())])

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            x = stage(x) + x
        return x


class Recurrent(nn.Module):
    """Recurrent layers within blocks, and a cell that is called in a loop across them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.cell = _Layer(nn.GRU), _Layer(nn.LSTM), nn.GRUCell(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(self.first(x))
        h = y[:, 0]
        for step in range(3):
            h = self.cell(y[:, step], h)
        return y + h[:, None]


class _Layer(nn.Module):
    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.rnn, self.out = kind(8, 8, batch_first=True), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.out(self.rnn(x)[0])
        return y


class Cells(nn.Module):
    """Its block is a recurrent cell that is called in a loop."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = _Cell()

    def forward(self, x: Tensor) -> Tensor:
        h = x[:, 0]
        for step in range(3):
            h = self.cell(x[:, step], h)
        return h


class _Cell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return torch.tanh(self.a(x) + self.b(h))


class Writes(Stack):
    """Operations write into values in place, within blocks and across their borders."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers[0](x)
        y = x * 2
        y += 1
        z: Tensor = self.layers[1](y)
        z.mul_(2)
        y = self.layers[2](z) * 1.5
        return y.add_(1)


def rewritten(traced: graphreg.Traced, model: nn.Module, **keywords: Any) -> Any:
    """What ``regularize`` makes of a model whose trace is that of another model of its class."""
    traced = replace(traced, model=model)
    planned = {name: keywords.pop(name) for name in ("blocks", "own_dropout", "keep") if name in keywords}
    made = {name: keywords.pop(name) for name in ("rng", "penalties", "scale") if name in keywords}
    return graphreg.rewrite(traced, graphreg.plan(traced, graphreg.from_kwargs(traced, **keywords), **planned), **made)


@dataclass(frozen=True)
class Case:
    """A model, its blocks, the arguments of a call, and further keywords of ``regularize``."""

    make: Callable[[], nn.Module]
    blocks: Any
    inputs: Callable[[], Any] = lambda: torch.randn(5, 8)
    more: dict[str, Any] = field(default_factory=dict)

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return self.make()


def _rows() -> Tensor:
    return torch.randn(2, 4, 8)


CASES = {
    "stack": Case(Stack, "layers.*"),
    "one block of three": Case(Stack, "layers.1"),
    "twice": Case(Twice, "layers.*"),
    "skips": Case(Skips, ["down*", "up*"], lambda: torch.randn(2, 3, 8, 8)),
    "dicts and tuples": Case(Named, ["first", "second"], lambda: (torch.randn(5, 8), torch.ones(5, 8))),
    "shared": Case(SharedInside, "layers.*"),
    "two graphs": Case(TwoGraphs, ["layers.*", "extra"]),
    "nested": Case(Nested, ["stages.*", "stages.0.*"]),
    "inner of nested": Case(Nested, "stages.*.*"),
    "recurrent": Case(Recurrent, ["first", "second"], _rows, {"recurrent_norm": {"weight": 0.1, "pattern": ["first.rnn", "cell"]}}),
    "cells": Case(Cells, "cell", _rows, {"recurrent_state": {"weight": 0.1, "pattern": "cell"}}),
    "writes": Case(Writes, "layers.*"),
    "contractive": Case(Stack, "layers.*", more={"contractive": 0.1}),
    "contractive at a value": Case(Stack, "layers.*", more={"contractive": {"weight": 0.1, "pattern": "layers.2", "wrt": "layers.0.relu"}}),
    "all at once": Case(Stack, "layers.*", more={"decov": 0.1, "covariance": {"weight": 0.1, "pattern": "layers.1"}}),
    "attached": Case(Stack, "layers.*", more={"penalties": "attach", "scale": 2.0}),
    "no noise": Case(Stack, "layers.*", more={"hidden_dropout": None, "hidden_noise": None, "own_dropout": "keep"}),
    "native dropout alone": Case(Stack, "layers.*", more={"hidden_dropout": None, "hidden_noise": None, "own_dropout": 0.4}),
}
