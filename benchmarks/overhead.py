"""What is not arithmetic: an eager call of a tiny net, noticing changes of a model in place, the start of a process; each with its goal.

With ``--before FOLDER``, where ``pip install --target FOLDER`` has put an earlier version, that one notices changes in turns with this one.
"""

from __future__ import annotations

import argparse
import gc
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from alternate import alternated
from page import arguments, chosen, row
from torch import Tensor, nn

import graphreg
from workloads import L1, L2, RATE

WIDTH, BATCH = 8, 16  # so small that nearly all the time is overhead
GOAL = 60.0  # µs a call beyond by hand
BURST = 20
CALLS = 20  # a sample: one call is too short to time


class ByHand(nn.Module):
    """What a user writes: ``nn.Dropout`` and the mean absolute value after the ReLU, the mean square of both weights."""

    def __init__(self, model: nn.Sequential) -> None:
        super().__init__()
        self.first, self.relu, self.last = model
        self.dropout = nn.Dropout(RATE)

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        h = self.dropout(self.relu(self.first(x)))
        weights = (self.first.weight.square().mean() + self.last.weight.square().mean()) / 2
        return self.last(h), {"hidden_l1": L1 * h.abs().mean(), "weight_l2": L2 * weights}


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 2))


def forms() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {
        "unregularized": net(),
        "by hand": ByHand(net()),
        "dropout": graphreg.regularize(net(), hidden_dropout=RATE),
        "hidden_l1": graphreg.regularize(net(), hidden_l1=L1),
        "weight_l2": graphreg.regularize(net(), weight_l2=L2),
        "graphreg": graphreg.regularize(net(), hidden_dropout=RATE, hidden_l1=L1, weight_l2=L2),
    }


def forward(form: nn.Module, x: Tensor) -> None:
    form(x)


def step(form: nn.Module, x: Tensor) -> None:
    for parameter in form.parameters_alone:
        parameter.grad = None
    result = form(x)
    output, penalties = (result, {}) if isinstance(result, Tensor) else result
    (output.square().mean() + sum(penalties.values())).backward()


def measure(run: Callable[[nn.Module, Tensor], None], rounds: int) -> dict[str, float]:
    """Median µs of CPU time of a call of each form, taken in turns."""
    built, x = forms(), torch.randn(BATCH, WIDTH)
    for form in built.values():
        form.__dict__["parameters_alone"] = list(form.parameters())  # as an optimizer has them
    times: dict[str, list[float]] = {name: [] for name in built}
    for turn in range(rounds + 5):
        for name, form in built.items():
            start = time.thread_time()
            for _ in range(CALLS):
                run(form, x)
            if turn >= 5:
                times[name].append((time.thread_time() - start) / CALLS * 1e6)
    return {name: statistics.median(values) for name, values in times.items()}


TRACED = "import torch, torchvision; torch.fx.symbolic_trace(torchvision.models.resnet18())"
TRAINED = (
    "import torch; net = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)); x = torch.ones(4, 8); {}"
)
OURS = (
    "import graphreg; output, penalties = graphreg.regularize(net, hidden_dropout=0.1, hidden_l1=1e-3, weight_l2=1e-3)(x); "
    "(output.sum() + sum(penalties.values())).backward()"
)
# For each line of the table: the process, the process that it is compared with, and the goal for the ratio, if there is one.
STARTS: dict[str, tuple[list[str], list[str], float | None]] = {
    "graphreg names torchvision.models:resnet18": (["-m", "graphreg", "names", "torchvision.models:resnet18"], ["-c", TRACED], 1.25),
    "a step with three regularizers": (["-c", TRAINED.format(OURS)], ["-c", TRAINED.format("net(x).sum().backward()")], None),
}


def seconds(arguments: list[str]) -> float:
    """CPU seconds of a process, because other processes on the machine change the time that passes."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *arguments], stdout=subprocess.DEVNULL, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def calls(rounds: int) -> None:
    print(f"A net of two layers of width {WIDTH}, batch {BATCH}, eager, {rounds} interleaved rounds.\n")
    print(row("µs a call", *forms(), "graphreg - by hand", "goal"))
    print(row(*["---"] * 9))
    for name, run in (("forward", forward), ("step", step)):
        found = measure(run, rounds)
        beyond = found["graphreg"] - found["by hand"]
        print(row(name, *(f"{each:.0f}" for each in found.values()), f"{beyond:.0f}", f"at most {GOAL:.0f}"), flush=True)


def starts(rounds: int) -> None:
    print(f"CPU seconds of processes, {rounds} interleaved rounds.\n")
    print(row("process", "s", "the same without graphreg, s", "ratio", "goal"))
    print(row(*["---"] * 5))
    for name, (ours, plain, goal) in STARTS.items():
        pairs = [(seconds(ours), seconds(plain)) for _ in range(rounds + 1)][1:]  # the first reads files from disk
        times = [statistics.median(each) for each in zip(*pairs, strict=True)]
        ratio = statistics.median(a / b for a, b in pairs)
        print(row(name, *(f"{each:.2f}" for each in times), f"{ratio:.2f}", f"at most {goal}" if goal else "none"), flush=True)


def bert() -> tuple[Callable[[], float], dict[str, int]]:
    """A step that notices no change of a BERT of 12 layers, ``BURST`` times. It runs in a process of its own, also with 0.2."""
    from transformers import BertConfig, BertModel  # noqa: PLC0415  # seconds, for this part alone

    from graphreg.in_place.fingerprint import Fingerprint  # noqa: PLC0415

    model = BertModel(BertConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=12, num_attention_heads=2, vocab_size=50))
    graphreg.regularize_(model, hidden_dropout=RATE, example_inputs={"input_ids": torch.zeros(2, 8, dtype=torch.long)}, penalties="return")
    (found,) = [each for each in gc.get_objects() if type(each) is Fingerprint]

    def burst() -> float:
        start = time.thread_time()
        for _ in range(BURST):
            found.same()
        return time.thread_time() - start

    return burst, {"modules": len([*model.modules()])}


def noticing(rounds: int, before: str) -> None:
    """Medians and minima of many short bursts, of two processes in turns: the machine is never quiet for long."""
    variants = {"now": [], **({"before": []} if before else {})}
    found = alternated("overhead:bert", variants, rounds, paths={"before": before})
    modules = found["now"].facts["modules"]
    print(f"Noticing changes of a BERT of {modules} modules in place, {rounds} bursts of {BURST}.\n")
    print(row("µs a call", "median", "minimum", "goal"))
    print(row(*["---"] * 4))
    for name, series in found.items():
        times = [each / BURST * 1e6 for each in series.seconds]
        goal = f"at most {modules}" if name == "now" else "none"
        print(row(name, f"{statistics.median(times):.0f}", f"{min(times):.0f}", goal), flush=True)


PARTS: dict[str, Callable[[argparse.Namespace], None]] = {
    "calls": lambda options: calls(options.rounds),
    "noticing": lambda options: noticing(options.rounds, options.before),
    "starts": lambda options: starts(options.processes),
}


def main() -> None:
    options = arguments(__doc__, ("--rounds", 150), ("--processes", 5), ("--threads", 1), ("--before", ""), names=PARTS)
    torch.set_num_threads(options.threads)
    for part in chosen(PARTS, options.only).values():
        part(options)
        print()


if __name__ == "__main__":
    main()
