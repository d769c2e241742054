"""The goals for the cost of ``regularize()``, ``plan``, ``names`` and of eager calls at scale, each beside what was measured."""

from __future__ import annotations

import gc
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, fx, nn

import graphreg
from graphreg import Traced
from graphreg.passes import HiddenL1

Timer = Callable[[Callable[[], object]], float]


@dataclass(frozen=True)
class Goal:
    """What is wanted of something, and what was measured, as text."""

    what: str
    wanted: str
    measured: str


class Layers(nn.Module):
    """Many small layers, each with a ReLU: in eager, almost all of a call is Python."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.relu(layer(x))
        return x


def goals(deep: Callable[[int], nn.Module], seconds: Timer, fraction: int) -> Iterator[Goal]:
    """Measure each goal.

    Args:
        deep: Makes a model of so many nodes.
        seconds: Returns how long a function takes.
        fraction: By how much to divide the sizes.
    """
    yield from exact_names(deep, seconds, fraction)
    yield peak(60_000 // fraction)
    yield names(deep(100_000 // fraction), "a forward that reads `training`", seconds)
    yield names(Layers(50_000 // fraction), "a forward that does not", seconds)
    yield from eager(2_000 // fraction, seconds)


def exact_names(deep: Callable[[int], nn.Module], seconds: Timer, fraction: int) -> Iterator[Goal]:
    """A plan and a rewrite with 1,000 to 10,000 exact names."""
    traced, times = graphreg.trace(deep(50_000 // fraction)), list[tuple[int, float, float]]()
    sites = [site.name for site in traced.values if site.selectable]
    for count in (1_000 // fraction, 5_000 // fraction, 10_000 // fraction):
        planned, rewritten = one_plan(traced, sites[:count], seconds)
        times.append((count, planned, rewritten))
    for what, i in (("plan", 1), ("rewrite", 2)):
        seen = ", ".join(f"{each[i]:.2f} s with {each[0]:,}" for each in times)
        growth = times[2][i] / times[1][i]
        yield Goal(f"`{what}` with twice as many exact names", "linear: at most 2.2 times", f"{growth:.2f} times ({seen})")


def one_plan(traced: Traced, sites: list[str], seconds: Timer) -> tuple[float, float]:
    """Return how long a plan takes that has these exact names, and how long its rewrite takes."""
    made = list[graphreg.Plan]()
    planned = statistics.median(seconds(lambda: made.append(graphreg.plan(traced, HiddenL1(sites, 1.0)))) for _ in range(3))
    return planned, seconds(lambda: graphreg.rewrite(traced, made[0], rng=0))


def peak(nodes: int) -> Goal:
    """The peak memory of a process that regularizes a model of 60,000 nodes, torch included."""
    command = [sys.executable, str(Path(__file__).with_name("cost.py")), "--peak", str(nodes)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return Goal(f"peak memory of `regularize()` at {nodes:,} nodes", "at most 1.3 GB", f"{float(done.stdout):.2f} GB")


def names(model: nn.Module, which: str, seconds: Timer) -> Goal:
    """``names`` of a large model, in traces by torch.fx."""
    ratios = []
    for _ in range(3):
        trace = seconds(lambda: fx.symbolic_trace(model))
        ratios.append(seconds(lambda: graphreg.names(model)) / trace)
    nodes = len(fx.symbolic_trace(model).graph.nodes)
    what = f"`names` of {nodes:,} nodes, in `symbolic_trace` calls ({which})"
    return Goal(what, "at most 1.5", f"{statistics.median(ratios):.2f}")


def eager(count: int, seconds: Timer) -> Iterator[Goal]:
    """Training steps of a model of 2,000 layers in eager, with one penalty at one site and with a penalty on all weights."""
    model, x = Layers(count), torch.randn(8, 16)
    one = graphreg.regularize(model, HiddenL1("layers.7", 1e-3))
    weights = graphreg.regularize(model, weight_l2=1e-4)
    parameters = [layer.weight for layer in model.layers]

    def step(loss: Callable[[], Tensor]) -> Callable[[], None]:
        def run() -> None:
            loss().backward()
            model.zero_grad()

        return run

    def ours(module: nn.Module) -> Tensor:
        output, penalties = module(x)
        return output.sum() + sum(penalties.values())

    steps = {
        "plain": step(lambda: model(x).sum()),
        "one": step(lambda: ours(one)),
        "by hand": step(lambda: model(x).sum() + 1e-4 * torch.stack([w.square().mean() for w in parameters]).mean()),
        "weights": step(lambda: ours(weights)),
    }
    for run in steps.values():
        run()
    gc.collect()
    gc.freeze()  # the thousands of modules are no garbage: without this, whoever runs next pays for looking at them
    times = [{name: seconds(run) for name, run in steps.items()} for _ in range(15)]
    one_ratio, weight_ratio = (statistics.median(t[a] / t[b] for t in times) for a, b in (("one", "plain"), ("weights", "by hand")))
    what = f"eager step of {count:,} layers"
    yield Goal(f"{what}, one penalty at one site, in a plain step", "at most 1.03", f"{one_ratio:.3f}")
    yield Goal(f"{what}, a penalty on all weights, in one by hand", "at most 1.05", f"{weight_ratio:.3f}")
