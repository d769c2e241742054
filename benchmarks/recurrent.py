"""Recurrent classifiers with a penalty on their states: graphreg, compiled, against the model in eager with the penalty written by hand.

The model itself cannot be compiled for comparison: torch.compile(fullgraph=True) does not take nn.LSTM, nn.GRU and nn.RNN.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from page import arguments, chosen, progress, row
from steps import step
from torch import Tensor, nn

import graphreg

WEIGHT, BATCH, FEATURES, UNITS, LENGTHS = 1e-2, 64, 40, 128, (10, 60, 200)
KINDS: dict[str, Callable[..., nn.RNNBase]] = {
    "LSTM 128": nn.LSTM, "LSTM 128, two layers, dropout": lambda *a, **k: nn.LSTM(*a, num_layers=2, dropout=0.2, **k),
    "GRU 128": nn.GRU, "Elman 128": nn.RNN,
}  # fmt: skip


KEY = "recurrent_state"


class Classifier(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.rnn, self.head = KINDS[kind](FEATURES, UNITS, batch_first=True), nn.Linear(UNITS, 10)

    def forward(self, x: Tensor) -> Tensor:
        out, _ = self.rnn(x)
        return self.head(out[:, -1])


class ByHand(nn.Module):
    def __init__(self, model: Classifier) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        out, _ = self.model.rnn(x)
        return self.model.head(out[:, -1]), WEIGHT * out.diff(dim=1).square().mean()


class ByGraphreg(nn.Module):
    def __init__(self, model: Classifier, compiled: bool) -> None:
        super().__init__()
        self.module = graphreg.regularize(model, compile=compiled, **{KEY: {"weight": WEIGHT, "pattern": "rnn:out"}})

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        output, penalties = self.module(x)
        return output, penalties[KEY]


FORMS: dict[str, Callable[[Classifier], nn.Module]] = {
    "by hand, eager": ByHand, "graphreg, eager": lambda model: ByGraphreg(model, False),
    "graphreg, compiled": lambda model: ByGraphreg(model, True),
}  # fmt: skip


def inputs(length: int) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(BATCH, length, FEATURES)


def measure(kind: str, length: int, rounds: int) -> tuple[float, dict[str, tuple[float, float]]]:
    """The step by hand in milliseconds, and of each form median and spread (quartiles' half distance) of its ratio to that."""
    torch._dynamo.reset()
    x, built = inputs(length), {name: wrap(Classifier(kind)) for name, wrap in FORMS.items()}
    times: dict[str, list[float]] = {name: [] for name in built}
    for i in range(rounds + 4):  # interleaved; the first four are to warm up
        for name, form in built.items():
            start = time.perf_counter()
            step(form, x)
            times[name] += [time.perf_counter() - start] if i >= 4 else []
    plain = times["by hand, eager"]
    quartiles = {name: statistics.quantiles([t / p for t, p in zip(taken, plain, strict=True)]) for name, taken in times.items()}
    return statistics.median(plain) * 1e3, {name: (q[1], (q[2] - q[0]) / 2) for name, q in quartiles.items()}


def compile_seconds(kind: str, length: int) -> float:
    """The first compiled step, forward and backward, without caches; the compiler itself is warm."""
    warm = torch.compile(nn.Linear(3, 3))
    warm(torch.randn(2, 3)).sum().backward()
    module, x, start = ByGraphreg(Classifier(kind), True), inputs(length), time.perf_counter()
    step(module, x)
    return time.perf_counter() - start


def in_a_process(kind: str, length: int) -> float:
    environment = os.environ | {"TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
    call = f"import recurrent; print(recurrent.compile_seconds({kind!r}, {length}))"
    here = os.path.dirname(os.path.abspath(__file__))
    done = subprocess.run([sys.executable, "-c", call], env=environment, cwd=here, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def main() -> None:
    options = arguments(__doc__, ("--rounds", 20), ("--times", 1), names=KINDS)
    torch.set_num_threads(1)
    print(
        f"1 thread, batch {BATCH}, {FEATURES} raw features, {options.rounds} interleaved rounds. The penalty is the mean of "
        "(h_t - h_(t-1))². Ratios to an eager step with the penalty written by hand. "
        f"Time to compile: median of {options.times} processes, in seconds.\n"
    )
    columns = [name for name in FORMS if name != "by hand, eager"]
    print(row("layer", "steps", "by hand, eager, ms", *columns, "time to compile"))
    print(row(*["---"] * (4 + len(columns))))
    for kind in chosen(KINDS, options.only):
        for length in LENGTHS:
            progress(f"recurrent: {kind}, {length} steps")
            plain, found = measure(kind, length, options.rounds)
            seconds = statistics.median(in_a_process(kind, length) for _ in range(options.times))
            cells = [f"{found[name][0]:.2f} ± {found[name][1]:.2f}" for name in columns]
            print(row(kind, length, f"{plain:.1f}", *cells, f"{seconds:.1f}"), flush=True)


if __name__ == "__main__":
    main()
