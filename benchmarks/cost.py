"""The cost of ``regularize()``, checks included, in units of what a trace costs anyway: two ``symbolic_trace`` calls, one a mode.

Times are CPU seconds of one thread, so that other work on the machine changes them little. After the table come the goals, each beside
what was measured (``cost_goals.py``).
"""

from __future__ import annotations

import argparse
import gc
import platform
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from cost_goals import goals
from torch import Tensor, fx, nn

import graphreg

WIDTH = 4  # small: the graph is measured, not the arithmetic
PER_BLOCK, PER_STAGE = 10, 10  # nodes a block, blocks a stage
ROUNDS = {1_000: 9, 5_000: 7, 50_000: 2, 100_000: 2}


class Block(nn.Module):
    """A residual block of ten nodes: three layers, functions, methods, a dropout that depends on the mode."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.relu, self.drop = nn.ReLU(), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.relu(self.up(self.norm(x)))
        h = F.dropout(h.reshape(-1, WIDTH), 0.1, self.training)
        return x + self.drop(F.gelu(self.down(h))) * 0.5


class Deep(nn.Module):
    """Stages of blocks between two layers, of about ``nodes`` graph nodes in all."""

    def __init__(self, nodes: int) -> None:
        super().__init__()
        blocks = nodes // PER_BLOCK
        self.stem, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2)
        sizes = [min(PER_STAGE, blocks - start) for start in range(0, blocks, PER_STAGE)]
        self.stages = nn.ModuleList(nn.Sequential(*(Block() for _ in range(size))) for size in sizes)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x))
        for stage in self.stages:
            x = stage(x)
        return self.head(x)


@dataclass(frozen=True)
class Row:
    """Medians with half the distance of the quartiles; ``traces`` in seconds, the rest without unit.

    ``ratio``: ``regularize()`` to two traces. ``growth``: ``regularize()`` to the same at half the nodes.
    ``with_inputs``: ``regularize()`` with example inputs, which also runs the model on fake tensors, to two traces.
    """

    nodes: int
    traces: tuple[float, float]
    ratio: tuple[float, float]
    growth: tuple[float, float]
    with_inputs: tuple[float, float]


def two_traces(model: nn.Module) -> None:
    """What whoever needs both modes pays to torch.fx alone."""
    for mode in (True, False):
        fx.symbolic_trace(model.train(mode))
    model.train()


def regularized(model: nn.Module, x: Tensor | None = None) -> None:
    graphreg.regularize(model, example_inputs=x, rng=0, hidden_dropout=0.1, hidden_l1=1e-3, weight_l2=1e-4)


def seconds(run: Callable[[], None]) -> float:
    gc.collect()  # nobody pays for what another left behind
    start = time.process_time()
    run()
    return time.process_time() - start


def measure(nodes: int, rounds: int) -> Row:
    """One row; in each round everybody runs once, and the ratios are taken round by round."""
    model, half, x = Deep(nodes), Deep(nodes // 2), torch.randn(8, WIDTH)
    runs: dict[str, Callable[[], None]] = {
        "traces": lambda: two_traces(model),
        "ours": lambda: regularized(model),
        "half": lambda: regularized(half),
        "with_inputs": lambda: regularized(model, x),
    }
    two_traces(half)
    regularized(half, x)  # imports, caches
    times = [{name: seconds(run) for name, run in runs.items()} for _ in range(rounds)]
    return Row(
        nodes=nodes,
        traces=spread([t["traces"] for t in times]),
        ratio=spread([t["ours"] / t["traces"] for t in times]),
        growth=spread([t["ours"] / t["half"] for t in times]),
        with_inputs=spread([t["with_inputs"] / t["traces"] for t in times]),
    )


def spread(values: list[float]) -> tuple[float, float]:
    first, median, third = statistics.quantiles(values, method="inclusive")
    return median, (third - first) / 2


def rows(rounds: dict[int, int] | None = None) -> Iterator[Row]:
    """A row for each size, as soon as it is measured; ``rounds`` maps numbers of nodes to numbers of rounds."""
    for nodes, count in (rounds or ROUNDS).items():
        yield measure(nodes, count)


def table(measured: Iterator[Row]) -> Iterator[str]:
    """The lines of the Markdown table."""
    head = (
        "nodes",
        "two `symbolic_trace` calls, s",
        "`regularize()`, ratio to these",
        "growth from half the nodes",
        "with `example_inputs`, ratio to these",
    )
    yield f"| {' | '.join(head)} |"
    yield "|---|---|---|---|---|"
    for row in measured:
        cells = (f"{median:.2f} ± {half:.2f}" for median, half in (row.traces, row.ratio, row.growth, row.with_inputs))
        yield f"| {row.nodes:,} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nodes", type=int, nargs="*", default=list(ROUNDS))
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--small", action="store_true", help="measure the other goals at a twentieth of their sizes, to try the script")
    parser.add_argument("--peak", type=int, help="only print the peak memory of one regularize() of a model of so many nodes, in GB")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.peak:
        regularized(Deep(options.peak))
        print(gigabytes())
        return
    print(f"torch {torch.__version__}, {platform.machine()}, one thread; interleaved rounds, medians with spread.\n")
    measured = list[Row]()
    for line in table(noted(rows({n: options.rounds or ROUNDS.get(n, 5) for n in options.nodes}), measured)):
        print(line, flush=True)
    print("\n| goal | wanted | measured |\n|---|---|---|")
    for row in measured:
        if row.nodes in (5_000, 50_000):
            print(f"| `regularize()` at {row.nodes:,} nodes, in two traces | at most 1.5 | {row.ratio[0]:.2f} |")
        if row.nodes == 100_000:
            print(f"| `regularize()` at 100,000 nodes, in that at 50,000 | linear: 2 | {row.growth[0]:.2f} |")
    for goal in goals(Deep, seconds, 20 if options.small else 1):
        print(f"| {goal.what} | {goal.wanted} | {goal.measured} |", flush=True)


def gigabytes() -> float:
    """The most memory that this process has had. On Linux, ``ru_maxrss`` starts with what the process that started this one had."""
    status = Path("/proc/self/status")
    peaks = [line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM:")] if status.exists() else []
    return float(peaks[0]) * 1024 / 1e9 if peaks else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def noted(measured: Iterator[Row], into: list[Row]) -> Iterator[Row]:
    """Pass rows on, and keep them."""
    for row in measured:
        into.append(row)
        yield row


if __name__ == "__main__":
    main()
