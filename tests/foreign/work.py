"""The processes that do the work of ``python -m foreign``: one record for each model and for each set of settings."""

from __future__ import annotations

import multiprocessing
import signal
import time
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from foreign.checks import checked
from foreign.inductor_settings import tried

SECONDS = 300  # for a model
Record = dict[str, Any]


def seed_of(seed: int, number: int) -> int:
    """The seed of a model, or of a set of settings, of a run."""
    return seed * 1_000 + number


def run(names: Sequence[str], seed: int, inductor: int, workers: int) -> Iterator[Record]:
    work = [(name, seed, inductor) for name in names]
    with multiprocessing.get_context("spawn").Pool(workers, maxtasksperchild=25) as pool:
        yield from pool.imap_unordered(_one, work)


class _Late(Exception):
    pass


def _alarm(*_: Any) -> None:
    raise _Late


def _one(work: tuple[str, int, int]) -> Record:
    """One model, or one set of settings: their results by check."""
    name, seed, inductor = work
    kind, _, number = name.partition(" ")
    torch.set_num_threads(1)
    signal.signal(signal.SIGALRM, _alarm)
    signal.alarm(SECONDS)
    began = time.monotonic()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            own = seed_of(seed, int(number))
            results = checked(own, int(number) % inductor == 0) if kind == "model" else tried(own)
    except _Late:
        results = {kind: "none: it does not end"}
    except Exception as error:  # of the sweep's own
        results = {kind: f"wrong: the check itself: {type(error).__name__}: {error}"}
    finally:
        signal.alarm(0)
    return {"name": name, "seconds": round(time.monotonic() - began, 1), "results": results}
