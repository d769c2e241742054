"""What graphreg's share of a compiled step is made of: each regularizer alone, and all of them by kind of kernel."""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
import torch._inductor.config as inductor
from page import arguments, chosen, progress, row
from steps import measure, step
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from workloads import L1, L2, RATE, WORKLOADS, ByGraphreg, Plain

ALONE = {"`hidden_dropout`": {"hidden_dropout": RATE}, "`hidden_l1`": {"hidden_l1": L1}, "`weight_l2`": {"weight_l2": L2}}
KINDS = {
    "products": r"aten::(mm|addmm|bmm|convolution|mkldnn|.*conv|_scaled_dot|.*attention)|mkldnn|convolution",
    "generated kernels": r"^graph_\d+_cpp",
    "copies": r"aten::(copy_|clone|fill_|zero_)",
}


def by_kind(make: Callable[[], nn.Module], x: Tensor, steps: int = 20) -> dict[str, float]:
    """Milliseconds a step in each kind of kernel; the rest is dispatch, guards and autograd."""
    torch._dynamo.reset()
    module = make()
    module.compile(fullgraph=True)
    for _ in range(4):
        step(module, x)
    with profile(activities=[ProfilerActivity.CPU]) as found:
        for _ in range(steps):
            step(module, x)
    times = dict.fromkeys([*KINDS, "the rest"], 0.0)
    for event in found.key_averages():
        kind = next((name for name, pattern in KINDS.items() if re.search(pattern, event.key)), "the rest")
        times[kind] += event.self_cpu_time_total / 1e3 / steps
    return times


def main() -> None:
    options = arguments(__doc__, ("--rounds", 15), names=WORKLOADS)
    torch.set_num_threads(1)
    forms = {"unregularized": Plain} | {n: lambda m, k=k: ByGraphreg(m, k) for n, k in ALONE.items()} | {"graphreg": ByGraphreg}
    print(f"Each regularizer alone, compiled, 1 thread, {options.rounds} interleaved rounds. Ratios to the unregularized step.\n")
    print(row("workload", *ALONE, "all three"))
    print(row(*["---"] * 5))
    for workload in chosen(WORKLOADS, options.only):
        progress(f"each alone: {workload}")
        found = measure(workload, True, options.rounds, forms)
        print(row(workload, *(f"{found[name][0]:.2f} ± {found[name][1]:.2f}" for name in (*ALONE, "graphreg"))), flush=True)
    print("\nMilliseconds per step by torch's profiler, unregularized → graphreg. The last column includes the profiler's own cost.\n")
    print(row("workload", *KINDS, "the rest"))
    print(row(*["---"] * (len(KINDS) + 2)))
    with inductor.patch({"cpp.enable_kernel_profile": True}):
        for workload, (make, shape) in chosen(WORKLOADS, options.only).items():
            progress(f"profile: {workload}")
            torch.manual_seed(0)
            x = torch.randn(shape)
            plain = by_kind(lambda make=make: Plain(make()), x)
            ours = by_kind(lambda make=make: ByGraphreg(make()), x)
            print(row(workload, *(f"{plain[kind]:.2f} → {ours[kind]:.2f}" for kind in plain)), flush=True)


if __name__ == "__main__":
    main()
