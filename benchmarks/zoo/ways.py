"""The two ways to regularize a model: a graph of it rewritten, by either front end, or the graphs that torch.compile captures."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import Any
from unittest import mock

import torch
from torch import nn

import graphreg
from graphreg import pipeline
from zoo.providers import Inputs, call

WEIGHTS: Mapping[str, Any] = {"hidden_dropout": 0.1, "hidden_l1": 1e-3, "weight_l2": 1e-4}
EVERY_HIDDEN: Mapping[str, Any] = {"weight": 1e-3, "pattern": "**#hidden"}  # norms' outputs among them, which HiddenL1 leaves out
Penalized = tuple[Any, dict[str, torch.Tensor]]


class Clock:
    """Adds up the seconds within a function, and keeps what it gave last."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.seconds, self.last = function, 0.0, None

    def __call__(self, *given: Any, **named: Any) -> Any:
        start = time.perf_counter()
        try:
            self.last = self.function(*given, **named)
        finally:
            self.seconds += time.perf_counter() - start
        return self.last


@contextmanager
def clocked(place: Any, name: str) -> Iterator[Clock]:
    clock = Clock(getattr(place, name))
    with mock.patch.object(place, name, clock):
        yield clock


class Rewritten:
    """``regularize``: the module, its stripped form, and what was traced; ``weights`` in place of some of ``WEIGHTS``."""

    def __init__(self, model: nn.Module, examples: Inputs | None, **weights: Any) -> None:
        self.named: Mapping[str, Any] = weights
        with clocked(pipeline, "trace") as traces, clocked(torch.export, "export") as exports:
            start = time.perf_counter()
            self.module: nn.Module = graphreg.regularize(model, example_inputs=examples, rng=0, **{**WEIGHTS, **weights})
            self.seconds = time.perf_counter() - start
        assert isinstance(traces.last, graphreg.Traced)
        self.traced: graphreg.Traced = traces.last
        self.shown: bool = examples is not None
        self.front_end: str = self.traced.front_end
        self.tracing: float = exports.seconds if self.front_end == "export" else traces.seconds
        self.graphs: int = len(self.traced.graphs)
        self.sites: dict[str, str] = {site.name: site.role for site in self.traced.values}

    @property
    def handle(self) -> Any:
        """What ``set_strength`` takes."""
        return self.module

    @cached_property
    def stripped(self) -> nn.Module:
        return graphreg.strip(self.module)

    def __call__(self, inputs: Inputs) -> Penalized:
        output, penalties = call(self.module, inputs)
        return output, penalties

    def train(self, mode: bool) -> None:
        self.module.train(mode)

    def compiled(self, inner: str) -> Callable[[Inputs], Penalized]:
        torch.compiler.reset()
        made = torch.compile(self.module, fullgraph=True, backend=inner)

        def forward(inputs: Inputs) -> Penalized:
            output, penalties = call(made, inputs)
            return output, penalties

        return forward


class Captured:
    """``graphreg.backend``: the model itself, compiled; ``refused`` is why no graph could be had."""

    front_end: str = "backend"
    shown: bool = False
    tracing: float = 0.0
    named: Mapping[str, Any] = {}

    def __init__(self, model: nn.Module, inputs: Inputs, refused: str, inner: str = "eager") -> None:
        torch.compiler.reset()
        self.model, self.refused = model, refused
        self.handle: Any = graphreg.backend(inner=inner, rng=0, **WEIGHTS)
        self.made: Any = torch.compile(model, backend=self.handle)
        start = time.perf_counter()
        self(inputs)
        self.seconds = time.perf_counter() - start
        self.graphs: int = len(self.handle.subgraphs)

    @property
    def sites(self) -> dict[str, str]:
        """The roles of all sites, hidden where any graph finds it so."""
        found = [(site.name, site.role) for part in self.handle.subgraphs for site in part.traced.values]
        return dict(found) | {name: role for name, role in found if role == "hidden"}

    def __call__(self, inputs: Inputs) -> Penalized:
        return call(self.made, inputs), self.handle.penalties()

    def train(self, mode: bool) -> None:
        self.model.train(mode)

    def compiled(self, inner: str) -> Callable[[Inputs], Penalized]:
        return lambda inputs: Captured(self.model, inputs, self.refused, inner)(inputs)


Way = Rewritten | Captured
