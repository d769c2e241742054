"""Runs scripts as torchrun does, each in several processes, but imports torch once; test_scale_page.py starts it.

python as_torchrun.py RANKS RUNS SCRIPT ...: runs each script in RANKS processes, RUNS times, and goes on with the next three arguments.
The processes of the n-th run write what they print to SCRIPT.n.
"""

from __future__ import annotations

import os
import runpy
import socket
import sys
import traceback

import graphreg  # noqa: F401
from graphreg import runtime  # noqa: F401


def rank_of(script: str, rank: int, ranks: int, port: int, out: str) -> int:
    """Fork a process that runs the script, and return its number."""
    if child := os.fork():
        return child
    try:
        file = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        os.chdir(os.path.dirname(script))
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
        os.environ["MASTER_PORT"] = str(port)
        sys.argv = [script]
        # The script's objects are kept: a DistributedDataParallel that is freed after its process group joins a thread of gloo's while it
        # holds the interpreter's lock, for which that thread may wait.
        kept = runpy.run_path(script, run_name="__main__")
        assert kept is not None
        sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def run(script: str, ranks: int, out: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = [rank_of(script, rank, ranks, port, out) for rank in range(ranks)]
    statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    if any(statuses):
        with open(out) as file:
            sys.exit(f"{script}: {statuses}\n{file.read()}")


if __name__ == "__main__":
    arguments = iter(sys.argv[1:])
    for ranks, runs, script in zip(arguments, arguments, arguments, strict=True):
        for i in range(int(runs)):
            run(script, int(ranks), f"{script}.{i}")
