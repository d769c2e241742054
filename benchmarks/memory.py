"""Bytes kept for backward and peak of what a step allocates, eager and compiled."""

from __future__ import annotations

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


def main() -> None:
    options = arguments(__doc__, names=WORKLOADS)
    torch.set_num_threads(1)
    print(
        "Kept: what the forward saves for backward. Peak: the most memory that is allocated during a step, beyond what was allocated "
        "before. Both in MB.\n"
    )
    print(row("workload", "form", "kept, eager", "kept, compiled", "peak, eager", "peak, compiled"))
    print(row(*["---"] * 6))
    for workload, (make, shape) in chosen(WORKLOADS, options.only).items():
        for form, wrap in FORMS.items():
            progress(f"memory: {workload}, {form}")
            torch._dynamo.reset()
            eager, compiled, x = wrap(make()), wrap(make()), torch.randn(shape)
            compiled.compile(fullgraph=True)
            step(compiled, x)
            cells = [f"{what(module, x) / 1e6:.1f}" for what in (kept_bytes, peak_bytes) for module in (eager, compiled)]
            print(row(workload, form, *cells), flush=True)


if __name__ == "__main__":
    main()
