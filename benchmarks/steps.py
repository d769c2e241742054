"""Step time, forward and backward, of each workload in each form, eager and compiled: ratios to the unregularized step."""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from workloads import FORMS, WORKLOADS


def step(run: Callable[[Tensor], tuple[Tensor, Tensor]], form: nn.Module, x: Tensor) -> None:
    form.zero_grad()
    output, penalty = run(x)
    (output.square().mean() + penalty).backward()


def saved_bytes(form: nn.Module, x: Tensor) -> int:
    """Bytes of the distinct storages that a forward keeps for backward, parameters left out."""
    kept: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in (*form.parameters(), *form.buffers())}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        output, penalty = form(x)
        total = sum(kept.values())
    del output, penalty
    return total


def measure(workload: str, compiled: bool, rounds: int) -> dict[str, tuple[float, float]]:
    """Median and spread (quartiles' half distance) of the ratio to the unregularized step, taken round by round."""
    torch._dynamo.reset()
    make, shape = WORKLOADS[workload]
    torch.manual_seed(0)
    x = torch.randn(shape)
    forms = {name: wrap(make()) for name, wrap in FORMS.items()}
    runs = {name: torch.compile(form, fullgraph=True) if compiled else form for name, form in forms.items()}
    for name, form in forms.items():
        for _ in range(3):
            step(runs[name], form, x)
    times: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(rounds):  # interleaved
        for name, form in forms.items():
            start = time.perf_counter()
            step(runs[name], form, x)
            times[name].append(time.perf_counter() - start)
    ratios = {name: [t / p for t, p in zip(times[name], times["unregularized"], strict=True)] for name in forms}
    quartiles = {name: statistics.quantiles(values) for name, values in ratios.items()}
    return {name: (q[1], (q[2] - q[0]) / 2) for name, q in quartiles.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=40)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"torch {torch.__version__}, {platform.machine()}, {options.threads} thread(s), {options.rounds} interleaved rounds")
    print(
        "| workload | mode | "
        + " | ".join(name for name in FORMS if name != "unregularized")
        + " | kept for backward, MB: by hand, graphreg |"
    )
    print("|---|---|---|---|---|")
    for workload, (make, shape) in WORKLOADS.items():
        for compiled in (False, True):
            ratios = measure(workload, compiled, options.rounds)
            cells = [f"{median:.2f} ± {spread:.2f}" for name, (median, spread) in ratios.items() if name != "unregularized"]
            kept = (
                ""
                if compiled
                else ", ".join(f"{saved_bytes(FORMS[n](make()), torch.randn(shape)) / 1e6:.1f}" for n in ("by hand", "graphreg"))
            )
            print(f"| {workload} | {'compiled' if compiled else 'eager'} | {' | '.join(cells)} | {kept} |", flush=True)


if __name__ == "__main__":
    main()
