"""Runs the arms: first the strengths, on seeds of their own, then the seeds of the results. What has run is kept after each run."""

from __future__ import annotations

import json
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from study.arms import ALLOWED, ARMS, SEEDS, TUNING, Arm, plain
from study.setups import SETUPS
from study.training import Outcome

Record = dict[str, Any]  # of an arm: "digest", "measured" (with what), "chosen", and "runs": strength, then seed, then outcome
Tell = Callable[[str], None]
DIGITS = 6  # significant ones that are kept of a measure


def train(setup: str, keywords: dict[str, Any], seed: int) -> Outcome:
    """One run, in a process with one thread; its seconds are CPU time."""
    torch.set_num_threads(1)
    start = time.process_time()
    outcome = SETUPS[setup](keywords, seed)
    outcome["seconds"] = time.process_time() - start
    return {name: float(f"{value:.{DIGITS}g}") for name, value in outcome.items()}


@contextmanager
def workers(count: int) -> Iterator[Executor]:
    with ProcessPoolExecutor(count, multiprocessing.get_context("spawn")) as pool:
        yield pool


def written(strength: float | None) -> str:
    """A strength as a key of the results."""
    return "" if strength is None else f"{strength:g}"


class Runs:
    """The results file, and the arms' records in it."""

    def __init__(self, path: Path, measured: str) -> None:
        self.path, self.measured = path, measured
        self.records: dict[str, Record] = json.loads(path.read_text()) if path.exists() else {}

    def record(self, arm: Arm) -> Record:
        """An arm's record; an empty one if there is none of this protocol."""
        if self.records.get(arm.name, {}).get("digest") != arm.digest:
            self.records[arm.name] = {"digest": arm.digest, "measured": self.measured, "runs": {}}
        return self.records[arm.name]

    def save(self) -> None:
        """Write the file anew, so that an interrupt leaves the older one or this one."""
        arms = ",\n".join(f"{json.dumps(name)}: {json.dumps(self.records[name])}" for name in ARMS if name in self.records)
        fresh = self.path.with_suffix(".new")
        fresh.write_text(f"{{\n{arms}\n}}\n")
        fresh.replace(self.path)

    def keywords(self, arm: Arm, strength: float | None) -> dict[str, Any]:
        """An arm's keywords, behind those of its base."""
        base = ARMS[arm.base] if arm.base else None
        before = self.keywords(base, self.records[base.name]["chosen"]) if base else {}
        return before | arm.filled(strength)

    def run(self, arm: Arm, pool: Executor, tell: Tell) -> None:
        """Choose the arm's strength, unless it has none to choose, and run the seeds of the results."""
        record = self.record(arm)
        self._seeds(arm, arm.grid or (None,), TUNING, pool, tell)
        if "chosen" not in record:
            record["chosen"] = chosen(arm, record["runs"], self.records[plain(arm.setup)]["runs"]) if arm.grid else None
            self.save()
        self._seeds(arm, (record["chosen"],), SEEDS, pool, tell)

    def _seeds(self, arm: Arm, strengths: Sequence[float | None], seeds: Sequence[int], pool: Executor, tell: Tell) -> None:
        runs = self.record(arm)["runs"]
        waiting: dict[Future[Outcome], tuple[str, str]] = {}
        for strength in strengths:
            for seed in seeds:
                if str(seed) not in runs.setdefault(written(strength), {}):
                    future = pool.submit(train, arm.setup, self.keywords(arm, strength), seed)
                    waiting[future] = written(strength), str(seed)
        try:
            for count, future in enumerate(as_completed(waiting), 1):
                at, of = waiting[future]
                runs[at][of] = future.result()
                tell(f"{count} of {len(waiting)} runs")
                self.save()
        except BaseException:
            for future in waiting:
                future.cancel()
            raise


def chosen(arm: Arm, runs: dict[str, dict[str, Outcome]], control: dict[str, dict[str, Outcome]]) -> float:
    """The strength that the arm's rule chooses by the mean validation score over the tuning seeds."""
    scores = [validation(runs[written(strength)]) for strength in arm.grid]
    if arm.rule == "best":
        return arm.grid[scores.index(max(scores))]  # the weaker one of equals
    assert arm.rule == "strongest"
    enough = [s for s, score in zip(arm.grid, scores, strict=True) if score >= validation(control[written(None)]) - ALLOWED]
    return enough[-1] if enough else arm.grid[0]


def validation(outcomes: dict[str, Outcome]) -> float:
    return fmean(outcomes[str(seed)]["validation"] for seed in TUNING)
