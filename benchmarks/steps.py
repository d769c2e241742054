"""Step time, forward and backward, of each workload in each form, eager and compiled: ratios to the unregularized step."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict

import torch
from alternate import alternated
from figures import ratio
from page import arguments, chosen, progress, row, stored
from torch import Tensor, nn

from workloads import FORMS, WORKLOADS

GOALS = {"transformer block 256, 16x128": 1.03}  # of compiled steps; 1.05 for the others


def step(form: nn.Module, x: Tensor) -> None:
    form.zero_grad()
    output, penalty = form(x)
    (output.square().mean() + penalty).backward()


def measure(
    workload: str, compiled: bool, rounds: int, forms: Mapping[str, Callable[[nn.Module], nn.Module]] = FORMS
) -> dict[str, tuple[float, float]]:
    """Median and spread (quartiles' half distance) of the ratio to the unregularized step, taken round by round."""
    torch._dynamo.reset()
    make, shape = WORKLOADS[workload]
    torch.manual_seed(0)
    x = torch.randn(shape)
    built = {name: wrap(make()) for name, wrap in forms.items()}
    for form in built.values():
        if compiled:
            form.compile(fullgraph=True)
        for _ in range(4):
            step(form, x)
    times: dict[str, list[float]] = {name: [] for name in built}
    for _ in range(rounds):  # interleaved
        for name, form in built.items():
            start = time.perf_counter()
            step(form, x)
            times[name].append(time.perf_counter() - start)
    plain = times[next(iter(forms))]
    ratios = {name: [t / p for t, p in zip(times[name], plain, strict=True)] for name in built}
    quartiles = {name: statistics.quantiles(values) for name, values in ratios.items()}
    found = {name: (q[1], (q[2] - q[0]) / 2) for name, q in quartiles.items()}
    by_hand = [t / h for t, h in zip(times["graphreg"], times["by hand"], strict=True)] if "by hand" in times else plain
    q = statistics.quantiles(by_hand)
    return found | {"graphreg / by hand": (q[1], (q[2] - q[0]) / 2), "ms": (statistics.median(plain) * 1e3, 0.0)}


def built(workload: str, form: str, compiled: bool) -> tuple[Callable[[], None], dict[str, object]]:
    """For ``alternate.py``: a step of a workload in a form, warmed up."""
    make, shape = WORKLOADS[workload]
    torch.manual_seed(0)
    x, module = torch.randn(shape), FORMS[form](make())
    if compiled:
        module.compile(fullgraph=True)
    for _ in range(4):
        step(module, x)
    return lambda: step(module, x), {}


def main() -> None:
    options = arguments(__doc__, ("--rounds", 25), ("--sets", 2), ("--threads", 1), names=WORKLOADS)
    columns = [*(name for name in FORMS if name != "unregularized"), "graphreg / by hand"]
    print(
        f"{options.threads} thread{'s' * (options.threads > 1)}, {options.rounds} rounds in each of {options.sets} sets of processes. Each "
        "variant has a process of its own, and they take turns. In brackets: the interval of 95 % of the median. The goal is that of "
        "graphreg, compiled.\n"
    )
    print(row("workload", "mode", "unregularized, ms", *columns, "goal"))
    print(row(*["---"] * (4 + len(columns))))
    for workload in chosen(WORKLOADS, options.only):
        for compiled in (False, True):
            mode = "compiled" if compiled else "eager"
            progress(f"step time: {workload}, {mode}, {options.threads} thread(s)")
            variants = {form: [workload, form, compiled] for form in FORMS}
            series = alternated("steps:built", variants, options.rounds, options.sets, options.threads)
            taken = {name: each.seconds for name, each in series.items()}
            found = {name: ratio(taken[name], taken["unregularized"]) for name in columns if name in taken}
            found["graphreg / by hand"] = ratio(taken["graphreg"], taken["by hand"])
            milliseconds = statistics.median(taken["unregularized"]) * 1e3
            goal = GOALS.get(workload, 1.05)
            data = {"ms": milliseconds, "goal": goal, **{name: asdict(each) for name, each in found.items()}}
            stored(f"steps-{options.threads}", f"{workload}, {mode}", data)
            missed = " (missed)" if compiled and found["graphreg"].median > goal else ""
            cells = [f"{found[name]}{missed if name == 'graphreg' else ''}" for name in columns]
            print(row(workload, mode, f"{milliseconds:.1f}", *cells, f"{goal:.2f}" if compiled else ""), flush=True)


if __name__ == "__main__":
    main()
