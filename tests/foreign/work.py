"""The processes that do the work of ``python -m foreign``: one record for each model and for each set of settings."""

from __future__ import annotations

import multiprocessing
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

import torch

from foreign.checks import checked
from foreign.inductor_settings import tried

SECONDS = 300  # for a model
Record = dict[str, Any]
Work = tuple[str, int, int]  # a name, the seed of the run, and how many models have one that Inductor runs, too


def seed_of(seed: int, number: int) -> int:
    """The seed of a model, or of a set of settings, of a run."""
    return seed * 1_000 + number


def run(names: Sequence[str], seed: int, inductor: int, workers: int) -> Iterator[Record]:
    threads, own = ThreadPoolExecutor(workers), threading.local()

    def record(name: str) -> Record:
        if not getattr(own, "process", None):
            own.process = _Process()
        return own.process.record((name, seed, inductor))  # type: ignore[no-any-return]

    try:
        for done in as_completed([threads.submit(record, name) for name in names]):
            yield done.result()
    finally:
        threads.shutdown(wait=False, cancel_futures=True)


class _Process:
    """A process that does the work of a thread. It is false when it has ended: after 25 pieces of work, or because one did not end.

    NNSmith's solver can run for ever, and hears neither a signal nor its own timeout then.
    """

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.ours, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()
        self.left = 25

    def __bool__(self) -> bool:
        return self.left > 0

    def record(self, work: Work) -> Record:
        self.ours.send(work)
        self.left -= 1
        try:
            found: Record | str = self.ours.recv() if self.ours.poll(SECONDS) else "none: it does not end"
        except EOFError:
            found = "wrong: the process died"
        if self.left == 0 or isinstance(found, str):
            self.left = 0
            self.process.kill()
        return {"name": work[0], "seconds": SECONDS, "results": {work[0].split()[0]: found}} if isinstance(found, str) else found


def _serve(connection: Any) -> None:
    while True:
        connection.send(_one(connection.recv()))


def _one(work: Work) -> Record:
    """One model, or one set of settings: their results by check."""
    name, seed, inductor = work
    kind, _, number = name.partition(" ")
    torch.set_num_threads(1)
    began = time.monotonic()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            own = seed_of(seed, int(number))
            results = checked(own, int(number) % inductor == 0) if kind == "model" else tried(own)
    except Exception as error:  # of the sweep's own
        results = {kind: f"wrong: the check itself: {type(error).__name__}: {error}"}
    return {"name": name, "seconds": round(time.monotonic() - began, 1), "results": results}
