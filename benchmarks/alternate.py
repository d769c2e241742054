"""Variants in processes of their own that take turns, so that none measures what another left behind: caches, memory, compiled code.

A variant is a list of arguments for a function that builds it and returns ``(step, facts)``: what is timed, and a dict of plain facts.
A step may return a float, the seconds that it took by its own clock.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


@dataclass
class Series:
    """The seconds of each turn of a variant, and what the variant told of itself; ``error`` if it could not be built."""

    seconds: list[float] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    error: str = ""


class Worker:
    """A process that has built a variant, and runs a step of it when it is told to."""

    def __init__(self, function: str, arguments: Sequence[Any], threads: int, path: str = "") -> None:
        call = f"import alternate; alternate.work({function!r}, {json.dumps(arguments)!r}, {threads})"
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": os.pathsep.join(filter(None, (path, str(HERE))))}
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", call], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *error: object) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()

    def told(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        return json.loads(line) if line else {"error": f"the process ended with status {self.process.wait()}"}

    def turn(self) -> float:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        seconds: float = self.told()
        return seconds


def work(function: str, arguments: str, threads: int) -> None:
    """The worker's side: build, tell the facts, then time a step for each line of standard input."""
    import torch  # noqa: PLC0415

    torch.set_num_threads(threads)
    answers, sys.stdout = sys.stdout, sys.stderr  # what the variant prints is no answer
    module, _, name = function.partition(":")
    try:
        step, facts = getattr(importlib.import_module(module), name)(*json.loads(arguments))
        said: Any = {"facts": facts}
    except Exception as error:
        said = {"error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}
    print(json.dumps(said), file=answers, flush=True)
    for _ in sys.stdin if "facts" in said else ():
        start = time.perf_counter()
        taken = step()
        print(json.dumps(taken if isinstance(taken, float) else time.perf_counter() - start), file=answers, flush=True)


def alternated(
    function: str,
    variants: Mapping[str, Sequence[Any]],
    rounds: int,
    sets: int = 1,
    threads: int = 1,
    paths: Mapping[str, str] | None = None,
) -> dict[str, Series]:
    """The series of each variant: ``sets`` times new processes, and in each ``rounds`` rounds in which every variant has its turn.

    The processes are started one after the other, and only one of them works at any moment.
    ``paths``: for a variant, a folder with the graphreg that it imports.
    """
    found = {name: Series() for name in variants}
    for _ in range(sets):
        with ExitStack() as running:
            workers = dict[str, Worker]()
            for name, arguments in variants.items():
                worker = running.enter_context(Worker(function, arguments, threads, (paths or {}).get(name, "")))
                said = worker.told()
                found[name].facts, found[name].error = said.get("facts", {}), said.get("error", "")
                if not found[name].error:
                    workers[name] = worker
            for _ in range(rounds):
                for name, worker in workers.items():
                    found[name].seconds.append(worker.turn())
    return found
