"""Runs scripts in ranks of torch.distributed, and leaves no process behind.

python rank_processes.py SCRIPT WORLD STORE OUT ARGUMENT...: imports SCRIPT, forks WORLD ranks, and calls ``main`` of SCRIPT in each: with
the arguments, once the rank has joined the process group. What ``main`` returns is written to OUT, followed by the number of the rank.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import multiprocessing
import os
import re
import signal
import subprocess
import sys
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def run_ranks(*arguments: object, paths: tuple[Path, ...] = (), cwd: Path | None = None, timeout: float = 900) -> str:
    """Run Python, and return what it and the processes that it forks print to stdout. Fail with all that they print.

    Args:
        arguments: The arguments of Python.
        paths: Folders from which the script imports.
        cwd: The folder in which it runs.
        timeout: The seconds after which all its processes are killed.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "TORCH_LOGS": "-all"}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, paths))
    command, pipes = [sys.executable, *map(str, arguments)], {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
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
    out = place / "rank"
    run_ranks(__file__, script, world, place / "store", out, *arguments, paths=(script.parent,), timeout=timeout)
    return [torch.load(f"{out}{rank}") for rank in range(world)]


def _rank(script: str, rank: int, world: int, store: str, out: str, arguments: list[str]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    torch.save(importlib.import_module(Path(script).stem).main(*arguments), f"{out}{rank}")
    gc.collect()  # torch 2.13 can wait forever if a DistributedDataParallel is freed after its process group
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    script, world, store, out, *arguments = sys.argv[1:]
    importlib.import_module(Path(script).stem)  # once, before the ranks are forked
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=_rank, args=(script, rank, int(world), store, out, arguments)) for rank in range(int(world))]
    for process in ranks:
        process.start()
    while running := [process for process in ranks if process.exitcode is None]:
        wait([process.sentinel for process in running])
        if any(process.exitcode for process in ranks):
            sys.exit(1)  # the others would wait for the one that failed
