"""Step time, forward and backward, of each workload in each form, eager and compiled: ratios to the unregularized step."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch
from page import arguments, chosen, progress, row
from torch import Tensor, nn

from workloads import FORMS, WORKLOADS


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


def main() -> None:
    options = arguments(__doc__, ("--rounds", 60), ("--threads", 1), names=WORKLOADS)
    torch.set_num_threads(options.threads)
    columns = [*(name for name in FORMS if name != "unregularized"), "graphreg / by hand"]
    print(f"{options.threads} thread{'s' * (options.threads > 1)}, {options.rounds} interleaved rounds.\n")
    print(row("workload", "mode", "unregularized, ms", *columns))
    print(row(*["---"] * (3 + len(columns))))
    for workload in chosen(WORKLOADS, options.only):
        for compiled in (False, True):
            progress(f"step time: {workload}, {'compiled' if compiled else 'eager'}, {options.threads} thread(s)")
            found = measure(workload, compiled, options.rounds)
            cells = [f"{found[name][0]:.2f} ± {found[name][1]:.2f}" for name in columns]
            print(row(workload, "compiled" if compiled else "eager", f"{found['ms'][0]:.1f}", *cells), flush=True)


if __name__ == "__main__":
    main()
