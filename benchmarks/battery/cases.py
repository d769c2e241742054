"""What the battery runs: each test of ``dieharder -a`` on each stream, and what is kept of it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

Record = Mapping[str, Any]
FIELDS = ("test_name", "ntuple", "tsamples", "psamples", "pvalues", "assessment")
MORE = 10  # times the samples, where a verdict was not PASSED

# Every kind of test once, those that read least first; then what `-a` repeats for other sizes, the lagged sums last.
_ONCE = (0, 15, 100, 10, 11, 12, 14, 16, 13, 8, 9, 3, 4, 5, 6, 7, 2, 1, 206, 204, 205, 207, 208, 101, 102, 209)
_SIZED: Mapping[int, Sequence[int]] = {202: range(2, 6), 200: range(1, 13), 201: range(2, 6), 203: (0, 1, 2, 4, 8, 16, 32)}
_LAGS = [lag for lag in range(33) if lag not in _SIZED[203]]


@dataclass(frozen=True)
class Case:
    """One test on one stream. ``place``: where in the stream it begins, in SPANs; ``times``: of the samples it has by default."""

    stream: str
    test: int
    size: int | None
    place: int
    times: int = 1

    def path(self, folder: Path) -> Path:
        size = "" if self.size is None else f"-{self.size}"
        return folder / self.stream.replace(" ", "-") / f"{self.test}{size}{'' if self.times == 1 else f'-x{self.times}'}.json"

    @property
    def command(self) -> list[str]:
        size = [] if self.size is None else ["-n", str(self.size)]
        more = [] if self.times == 1 else ["-m", str(self.times)]
        return ["dieharder", "-d", str(self.test), *size, "-g", "200", *more]


def every_test() -> list[tuple[int, int | None]]:
    """Each test of ``-a`` by dieharder's number, with its size, in the order of the run."""
    first = [(test, sizes[0]) for test, sizes in _SIZED.items()]
    rest = [(test, size) for test, sizes in _SIZED.items() for size in sizes[1:]]
    return [*((test, None) for test in _ONCE), *first, (17, None), *rest, *((203, lag) for lag in _LAGS)]


def cases(streams: Iterable[str]) -> list[Case]:
    streams = list(streams)
    return [Case(stream, test, size, place) for place, (test, size) in enumerate(every_test()) for stream in streams]


def again(case: Case) -> Case:
    """The same test on words that no test has read, with more samples."""
    return replace(case, place=case.place + len(every_test()), times=MORE)


def doubtful(record: Record) -> bool:
    return any(row["assessment"] != "PASSED" for row in record["rows"])


def record(case: Case, folder: Path) -> Record | None:
    """What was kept of it, if it has run."""
    path = case.path(folder)
    found: Record | None = json.loads(path.read_text()) if path.exists() else None
    return found


def keep(case: Case, folder: Path, found: Record) -> None:
    """Whole or not at all: a run may be stopped at any time."""
    path = case.path(folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(found))
    part.replace(path)


def waiting(chosen: Iterable[Case], folder: Path) -> list[Case]:
    """Those that have not run; first, of those that have and did not pass, the ones with more samples."""
    chosen = list(chosen)
    more = [again(case) for case in chosen if (found := record(case, folder)) and doubtful(found)]
    return [case for case in [*more, *chosen] if not case.path(folder).exists()]
