"""Runs scripts in ranks of torch.distributed, and leaves no process behind.

python rank_processes.py: imports torch once, and then for each line of its input, which is a JSON list of a script, the number of ranks,
a store, a place for results, and arguments, forks a process. That imports the script, forks the ranks, and calls ``main`` of the script in
each: with the arguments, once the rank has joined the process group. What ``main`` returns is written to the place, followed by the number
of the rank, and what all print, followed by ``.log``. The answer is a line with the exit status.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import importlib
import json
import multiprocessing
import os
import re
import select
import signal
import subprocess
import sys
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# What ranks would each import later, when they first rewrite and compile.
BEFORE = (
    "graphreg.pipeline", "graphreg.in_place.in_place", "graphreg.dynamo_backend.backend", "graphreg.reporting.entries",
    "graphreg.session.sampling", "torch.distributed.fsdp", "torch.distributed.tensor.parallel", "torch.distributed.tensor.experimental",
    "torch._dynamo.testing", "torch._dynamo.backends.distributed", "torch._dynamo.repro.after_aot", "torch._inductor.compile_fx",
)  # fmt: skip


def quiet_environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "TORCH_LOGS": "-all"}


def run_ranks(*arguments: object, paths: tuple[Path, ...] = (), cwd: Path | None = None, timeout: float = 900) -> str:
    """Run Python, and return what it and the processes that it forks print to stdout. Fail with all that they print.

    Args:
        arguments: The arguments of Python.
        paths: Folders from which the script imports.
        cwd: The folder in which it runs.
        timeout: The seconds after which all its processes are killed.
    """
    command, pipes = [sys.executable, *map(str, arguments)], {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    environment = quiet_environment() | {"PYTHONPATH": os.pathsep.join(map(str, paths))}
    with subprocess.Popen(command, env=environment, cwd=cwd, text=True, process_group=0, **pipes) as process:  # type: ignore[call-overload]
        try:
            output, errors = process.communicate(timeout=timeout)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, output + errors
    return without_gloo(output)


def without_gloo(text: str) -> str:
    """Return a text without the lines that gloo prints with torch 2.10. Ranks may have written into one line, or cut it in two."""
    return re.sub(r"^(.*(\[Gloo\]|peer ranks is : |peer ranks\. Expected ).*|\d+)\n", "", text, flags=re.MULTILINE)


def results_of(script: Path, world: int, place: Path, *arguments: object, timeout: float = 900) -> list[Any]:
    """Call ``main`` of a script in each of ``world`` ranks (gloo), and return what it returns, by rank.

    Args:
        script: A file with a function ``main``; it may import from its own folder.
        world: The number of ranks.
        place: An empty folder.
        arguments: The arguments of ``main``, as text.
        timeout: The seconds after which all ranks are killed.
    """
    process, out = _starter(), place / "rank"
    assert process.stdin is not None and process.stdout is not None
    asked = [script, world, place / "store", out, *arguments]
    print(json.dumps([str(each) for each in asked]), file=process.stdin, flush=True)
    try:
        told, _, _ = select.select([process.stdout], [], [], timeout)
        status = process.stdout.readline().strip() if told else f"none in {timeout} seconds"
    except BaseException:
        _end(process)
        raise
    if status != "0":
        _end(process)
    assert status == "0", f"status {status}: {Path(f'{out}.log').read_text()}"
    return [torch.load(f"{out}{rank}") for rank in range(world)]


@functools.cache
def _starter() -> subprocess.Popen[str]:
    """The process that forks ranks: torch is imported in it once for all scripts."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    command = [sys.executable, __file__]
    process: Any = subprocess.Popen(command, env=quiet_environment(), text=True, process_group=0, **pipes)  # type: ignore[call-overload]
    atexit.register(_end, process)
    return process  # type: ignore[no-any-return]


def _end(process: subprocess.Popen[str]) -> None:
    """End it, and all that it has forked."""
    _starter.cache_clear()
    atexit.unregister(_end)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with process:
        process.kill()


def _ranks(script: str, world: str, store: str, out: str, *arguments: str) -> None:
    """Fork the ranks, and wait for them."""
    with open(f"{out}.log", "w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    sys.path.insert(0, str(Path(script).parent))
    importlib.import_module(Path(script).stem)  # once, before the ranks are forked
    ranks = [fork.Process(target=_rank, args=(script, rank, int(world), store, out, arguments)) for rank in range(int(world))]
    for process in ranks:
        process.start()
    while running := [process for process in ranks if process.exitcode is None]:
        wait([process.sentinel for process in running])
        if any(process.exitcode for process in ranks):
            os._exit(1)  # the others would wait for the one that failed


def _rank(script: str, rank: int, world: int, store: str, out: str, arguments: tuple[str, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    torch.save(importlib.import_module(Path(script).stem).main(*arguments), f"{out}{rank}")
    gc.collect()  # torch 2.13 can wait forever if a DistributedDataParallel is freed after its process group
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    for module in BEFORE:
        importlib.import_module(module)
    fork = multiprocessing.get_context("fork")
    for line in sys.stdin:
        asked = fork.Process(target=_ranks, args=json.loads(line))
        asked.start()
        asked.join()
        print(asked.exitcode, flush=True)
