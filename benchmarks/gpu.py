"""``make gpu``: the tests that need a GPU, and the benchmark on it, into one JSON file: build/gpu.json. Whole in 25 minutes on one GPU.

Each part runs in a process of its own and is kept when it is done, so the same command goes on where it was stopped; ``--fresh`` starts
over, ``--only tests 'MLP*'`` runs some parts. Parts for which no time is left are named, and run by the next call.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from figures import ratio
from page import progress
from torch import Tensor, nn

import graphreg
from workloads import MLP, RATE, Block, ByHand, Compiled, ConvNet, Outcome, Plain, written

TOP = Path(__file__).resolve().parents[1]
RESULTS, MINUTES, ROUNDS = TOP / "build" / "gpu.json", 25.0, 50
NO_GPU = "make gpu: skipped, because torch finds no CUDA GPU (torch.cuda.is_available() is False). Nothing was run and nothing was written."
WORKLOADS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "MLP 4x512, batch 4096": (MLP, (4096, 512)),
    "transformer block 256, 64x512": (Block, (64, 512, 256)),
    "batch-norm conv net 64, 128x64x64": (ConvNet, (128, 3, 64, 64)),
}
MODES: dict[str, dict[str, Any] | None] = {"eager": None, "compiled": {}, "reduce-overhead": {"mode": "reduce-overhead"}}


class DropoutByHand(nn.Module):
    """``nn.Dropout`` at the sites, and no penalty."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.dropout = model, nn.Dropout(RATE)

    def forward(self, x: Tensor) -> Outcome:
        output = written(self.model, x, self.dropout, self.dropout)
        return output, output.new_zeros(())


FORMS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "unregularized": Plain, "nn.Dropout": DropoutByHand, "graphreg, dropout": lambda model: Compiled(model, {"hidden_dropout": RATE}),
    "by hand": ByHand, "graphreg": Compiled,
}  # fmt: skip


def names() -> list[str]:
    return ["tests", *(f"{workload}, {mode}" for workload in WORKLOADS for mode in MODES)]


def tests() -> dict[str, Any]:
    """Run the tests that are marked ``gpu``."""
    command = [sys.executable, "-m", "pytest", "-n", "0", "-m", "gpu", "-rA", "--no-header", "tests/gpu"]
    done = subprocess.run(command, cwd=TOP, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith(("PASSED", "FAILED", "SKIPPED", "ERROR"))]
    last = done.stdout.strip().splitlines()[-1:]
    return {"passed": done.returncode == 0, "summary": last, "tests": lines, "output": done.stdout[-20_000:]}


def benchmark(part: str, device: str = "cuda", rounds: int = ROUNDS) -> dict[str, Any]:
    """The steps of a workload in one mode: milliseconds, ratios to the unregularized step, and memory, by form."""
    workload, _, mode = part.rpartition(", ")
    make, shape = WORKLOADS[workload]
    x, seconds, found = torch.randn(shape, device=device), dict[str, list[float]](), dict[str, Any]()
    modules = dict[str, nn.Module]()
    for name, wrap in FORMS.items():
        torch.manual_seed(0)
        try:
            modules[name] = warmed(wrap(make().to(device)), x, MODES[mode])
        except Exception as error:
            found[name] = {"error": f"{type(error).__name__}: {error}"}
    seconds = {name: [] for name in modules}
    for _ in range(rounds):  # interleaved
        for name, module in modules.items():
            seconds[name].append(timed(module, x))
    plain = seconds["unregularized"]
    for name, module in modules.items():
        measured = asdict(ratio(seconds[name], plain))
        found[name] = {"ms": statistics.median(seconds[name]) * 1e3, "ratio": measured, "peak MB": peak(module, x)}
    return found


def warmed(module: nn.Module, x: Tensor, compiler: Mapping[str, Any] | None) -> nn.Module:
    if compiler is not None:
        module.compile(fullgraph=True, **compiler)
    for _ in range(6):  # CUDA graphs are recorded at the second and third call
        step(module, x)
    return module


def step(module: nn.Module, x: Tensor) -> None:
    torch.compiler.cudagraph_mark_step_begin()
    module.zero_grad()
    output, penalty = module(x)
    (output.square().mean() + penalty).backward()


def _wait(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize()


def timed(module: nn.Module, x: Tensor) -> float:
    _wait(x)
    start = time.perf_counter()
    step(module, x)
    _wait(x)
    return time.perf_counter() - start


def peak(module: nn.Module, x: Tensor) -> float | None:
    """The most memory during a step, in MB, beyond what was allocated before it."""
    if not x.is_cuda:
        return None
    module.zero_grad()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step(module, x)
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def machine() -> dict[str, str]:
    import triton  # noqa: PLC0415

    return {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__, "graphreg": graphreg.__version__}


def in_a_process(part: str, seconds: float) -> dict[str, Any]:
    """What a part gives, run by this script in a process of its own; an error if it fails or takes too long."""
    try:
        done = subprocess.run(
            [sys.executable, __file__, "--part", part], capture_output=True, text=True, check=False, timeout=seconds
        )
    except subprocess.TimeoutExpired:
        return {"error": f"it took more than {seconds:.0f} s"}
    if done.returncode:
        return {"error": done.stderr[-2000:]}
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def sweep(
    parts: list[str], path: Path, minutes: float, run: Callable[[str, float], dict[str, Any]] = in_a_process,
    now: Callable[[], float] = time.monotonic,
) -> list[str]:
    """Run the parts that the file does not have, as long as there is time. Write the file after each. Return the parts that are left."""
    results = json.loads(path.read_text()) if path.exists() else {}
    end, left = now() + minutes * 60, list[str]()
    for part in parts:
        if part in results.get("parts", {}) and "error" not in results["parts"][part]:
            continue
        remaining = end - now()
        if remaining < 30:
            left.append(part)
            continue
        progress(f"make gpu: {part}")
        results.setdefault("parts", {})[part] = run(part, remaining)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results, indent=1) + "\n")
    return left


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make gpu", description=__doc__)
    parser.add_argument("--only", nargs="+", default=["*"], metavar="GLOB")
    parser.add_argument("--fresh", action="store_true", help="run again what has run")
    parser.add_argument("--minutes", type=float, default=MINUTES)
    parser.add_argument("--part", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    given = options()
    if not torch.cuda.is_available():
        print(NO_GPU)
        return
    if given.part:
        print(json.dumps(tests() if given.part == "tests" else benchmark(given.part)))
        return
    if given.fresh or not RESULTS.exists():
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps({"machine": machine(), "parts": {}}))
    parts = [name for name in names() if any(fnmatchcase(name, pattern) for pattern in given.only)]
    left = sweep(parts, RESULTS, given.minutes)
    progress("")
    results = json.loads(RESULTS.read_text())["parts"]
    failed = [name for name in parts if name in results and ("error" in results[name] or results[name].get("passed") is False)]
    print(f"build/gpu.json is written: {len(results)} parts, {len(failed)} of them failed{''.join(f' ({n})' for n in failed)}.")
    if left:
        print(f"No time was left for {', '.join(left)}: give the command again.")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
