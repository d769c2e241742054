"""Bytes kept for backward and peak of what a step allocates, eager and compiled; time to compile."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time

import torch
from page import arguments, chosen, progress, row
from steps import step
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from workloads import FORMS, WORKLOADS


def kept_bytes(form: nn.Module, *inputs: Tensor) -> int:
    """Bytes of the distinct storages that a forward keeps for backward, parameters, buffers and the inputs left out."""
    kept: dict[int, int] = {}
    own = {t.untyped_storage().data_ptr() for t in (*form.parameters(), *form.buffers(), *inputs)}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        output, penalty = form(*inputs)
        total = sum(kept.values())
    del output, penalty
    return total


def peak_bytes(form: nn.Module, x: Tensor) -> int:
    """The most that torch's allocator held at once during a step, gradients included, beyond what it held before."""
    step(form, x)
    form.zero_grad()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        step(form, x)
    assert found.profiler is not None
    held = peak = 0
    for event in found.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def compile_seconds(workload: str, form: str) -> float:
    """The first compiled step, forward and backward, without caches; the compiler itself is warm."""
    make, shape = WORKLOADS[workload]
    warm = torch.compile(nn.Linear(3, 3))
    warm(torch.randn(2, 3)).sum().backward()
    module = FORMS[form](make())
    x, start = torch.randn(shape), time.perf_counter()
    module.compile(fullgraph=True)
    step(module, x)
    return time.perf_counter() - start


def in_a_process(workload: str, form: str) -> float:
    environment = os.environ | {"TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
    call = f"import memory; print(memory.compile_seconds({workload!r}, {form!r}))"
    here = os.path.dirname(os.path.abspath(__file__))
    done = subprocess.run([sys.executable, "-c", call], env=environment, cwd=here, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def main() -> None:
    options = arguments(__doc__, ("--times", 3), names=WORKLOADS)
    torch.set_num_threads(1)
    print(
        "Kept: what the forward saves for backward. Peak: the most memory that is allocated during a step, beyond what was allocated "
        f"before. Both in MB. Compile time: median of {options.times} interleaved processes, in seconds.\n"
    )
    print(row("workload", "form", "kept, eager", "kept, compiled", "peak, eager", "peak, compiled", "compile time", "/ by hand"))
    print(row(*["---"] * 8))
    for workload, (make, shape) in chosen(WORKLOADS, options.only).items():
        times: dict[str, list[float]] = {form: [] for form in FORMS}
        for i in range(options.times):
            for form in FORMS:
                progress(f"compile time: {workload}, {form}, {i + 1} of {options.times}")
                times[form].append(in_a_process(workload, form))
        for form, wrap in FORMS.items():
            torch._dynamo.reset()
            eager, compiled, x = wrap(make()), wrap(make()), torch.randn(shape)
            compiled.compile(fullgraph=True)
            step(compiled, x)
            cells = [f"{what(module, x) / 1e6:.1f}" for what in (kept_bytes, peak_bytes) for module in (eager, compiled)]
            seconds = statistics.median(times[form])
            ratio = statistics.median(t / h for t, h in zip(times[form], times["by hand"], strict=True))
            print(row(workload, form, *cells, f"{seconds:.1f}", f"{ratio:.2f}"), flush=True)


if __name__ == "__main__":
    main()
