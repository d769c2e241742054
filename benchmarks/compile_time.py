"""CPU seconds to compile a step, without caches and from the caches in a second process; nodes of the compiled graphs, by sites."""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from page import arguments, chosen, progress, row, stored
from torch import Tensor, fx, nn
from torch._dynamo.backends.common import aot_autograd

import known_models
import workloads

GOAL, NODES = 1.10, 4.0  # times by hand; nodes a site more than by hand
FORMS = ("by hand", "graphreg")
DEPTHS = (4, 8, 16)  # sites
HERE = Path(__file__).resolve().parent
GPT = "GPT of 12 layers, 384 wide, 1x512"


def _workload(name: str) -> Callable[[str], tuple[nn.Module, tuple[Tensor, ...]]]:
    make, shape = workloads.WORKLOADS[name]
    return lambda form: (workloads.FORMS[form](make()), (torch.randn(shape),))


def _gpt(form: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    of = known_models.MODELS[GPT]
    return known_models.FORMS[form](of.make(), of), of.inputs()


MODELS: dict[str, Callable[[str], tuple[nn.Module, tuple[Tensor, ...]]]] = {
    **{name: _workload(name) for name in ("MLP 4x512, batch 256", "resnet18, 16x64x64")}, GPT: _gpt,
}  # fmt: skip


def used() -> float:
    """CPU seconds of this process and the compilers that it has run."""
    found = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in found)


def step(module: nn.Module, inputs: Sequence[Tensor]) -> None:
    output, penalty = module(*inputs)
    (output.square().mean() + penalty).backward()


def first_step(model: str, form: str) -> float:
    """CPU seconds of the first compiled step, forward and backward; the compiler itself is warm."""
    torch.set_num_threads(1)
    step_of_nothing = torch.compile(nn.Linear(3, 3))
    step_of_nothing(torch.randn(2, 3)).sum().backward()
    module, inputs = MODELS[model](form)
    start = used()
    module.compile(fullgraph=True)
    step(module, inputs)
    return used() - start


def in_a_process(model: str, form: str, caches: str) -> float:
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": caches, "TORCHINDUCTOR_COMPILE_THREADS": "1", "OMP_NUM_THREADS": "1"}
    call = f"import compile_time; print(compile_time.first_step({model!r}, {form!r}))"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", call], env=environment, cwd=HERE, stdout=subprocess.PIPE, check=True)
    return float(done.stdout.split()[-1])


def measured(model: str, times: int) -> dict[str, dict[str, list[float]]]:
    """For each form: the seconds without caches, ``times`` of them, and the seconds from the caches, three times as many."""
    found: dict[str, dict[str, list[float]]] = {form: {"cold": [], "warm": [], "kernels": []} for form in FORMS}
    for i in range(times):
        for form in FORMS:
            progress(f"compile time: {model}, {form}, {i + 1} of {times}")
            with tempfile.TemporaryDirectory() as caches:
                found[form]["cold"].append(in_a_process(model, form, caches))
                found[form]["warm"] += [in_a_process(model, form, caches) for _ in range(3)]
                found[form]["kernels"].append(len(list(Path(caches).rglob("*.main.cpp")) or list(Path(caches).rglob("*.cpp"))))
    return found


def nodes(depth: int, form: str) -> tuple[int, int]:
    """The operations of the forward and the backward graph that Inductor gets for an MLP with so many sites."""
    counts: list[int] = []

    def count(module: fx.GraphModule, _: Any) -> Any:
        counts.append(sum(node.op == "call_function" for node in module.graph.nodes))
        return make_boxed_func(module.forward)

    backend = aot_autograd(fw_compiler=count, bw_compiler=count, partition_fn=min_cut_rematerialization_partition)
    layers = [layer for _ in range(depth) for layer in (nn.Linear(32, 32), nn.ReLU())]
    torch._dynamo.reset()
    module = workloads.FORMS[form](_Layers(*layers, nn.Linear(32, 3)))
    module.compile(backend=backend, fullgraph=True)
    step(module, (torch.randn(8, 32),))
    forward, backward = counts
    return forward, backward


class _Layers(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)  # type: ignore[no-any-return]


def times_table(options: Any) -> None:
    print(
        f"CPU seconds of the first compiled step, the compiler warm, one thread: medians of {options.times} processes without caches and "
        f"{3 * options.times} with them, in turns. Kernels: the C++ sources that Inductor compiles.\n"
    )
    print(row("model", "caches", *FORMS, "graphreg / by hand", "goal", "kernels, " + " / ".join(FORMS)))
    print(row(*["---"] * 7))
    for model in chosen(MODELS, options.only):
        found = measured(model, options.times)
        kernels = " / ".join(f"{found[form]['kernels'][0]:.0f}" for form in FORMS)
        for caches in ("cold", "warm"):
            hand, ours = (statistics.median(found[form][caches]) for form in FORMS)
            missed = " (missed)" if ours / hand > GOAL else ""
            stored("compile-time", f"{model}, {caches}", {"by hand": hand, "graphreg": ours, "ratio": ours / hand, "goal": GOAL})
            shown = "none" if caches == "cold" else "filled"
            print(row(model, shown, f"{hand:.2f}", f"{ours:.2f}", f"{ours / hand:.2f}{missed}", f"{GOAL:.2f}", kernels), flush=True)


def nodes_table() -> None:
    print("\nOperations of the forward + the backward graph, for MLPs with dropout, `hidden_l1` and `weight_l2` at so many sites.\n")
    print(row("sites", *FORMS, "more than by hand", "more a site", "goal"))
    print(row(*["---"] * 6))
    before: tuple[int, int] | None = None
    for depth in DEPTHS:
        counts = {form: nodes(depth, form) for form in FORMS}
        more = sum(counts["graphreg"]) - sum(counts["by hand"])
        growth = "" if before is None else f"{(more - before[1]) / (depth - before[0]):.1f}"
        before = depth, more
        stored("compile-time", f"{depth} sites", {"counts": counts, "more": more, "growth": growth})
        print(row(depth, *(f"{f} + {b}" for f, b in counts.values()), more, growth, f"at most {NODES:.0f}" if growth else ""), flush=True)


def main() -> None:
    options = arguments(__doc__, ("--times", 1), names=MODELS)
    times_table(options)
    nodes_table()


if __name__ == "__main__":
    main()
