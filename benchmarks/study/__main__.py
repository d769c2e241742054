"""``make study``: runs the arms of the study that have not run yet, and writes docs/study.json and docs/study.md."""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from contextlib import AbstractContextManager
from fnmatch import fnmatchcase
from pathlib import Path

import sklearn  # type: ignore[import-untyped]
import torch
from page import progress

from study.arms import ARMS, Arm, plain
from study.page import page
from study.run import Runs, workers

TOP = Path(__file__).parents[2]


def options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make study", description=__doc__)
    parser.add_argument("--only", nargs="+", default=["*"], metavar="GLOB", help="these arms, and those that they need")
    parser.add_argument("--fresh", action="store_true", help="run these arms again")
    parser.add_argument("--page-only", action="store_true", help="run nothing, write the page of what has run")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--results", type=Path, default=TOP / "docs" / "study.json", metavar="FILE")
    parser.add_argument("--page", type=Path, default=TOP / "docs" / "study.md", metavar="FILE")
    return parser.parse_args(arguments)


def measured() -> str:
    """What the results are measured with, and when."""
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, scikit-learn {sklearn.__version__}"
    return f"{versions} on {(named or [platform.machine()])[0]}, {datetime.date.today().isoformat()}"


def asked(patterns: Sequence[str]) -> list[Arm]:
    """The arms that the patterns name, with their controls and bases. Raises LookupError for a pattern that names none."""
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in ARMS):
            raise LookupError(f"--only {pattern!r} names no arm. There are: {', '.join(ARMS)}")
    named = {name for name in ARMS if any(fnmatchcase(name, pattern) for pattern in patterns)}
    needed = {plain(ARMS[name].setup) for name in named} | {ARMS[name].base for name in named}
    return [arm for name, arm in ARMS.items() if name in named | needed]


def main(arguments: Sequence[str] | None = None, pool_of: Callable[[int], AbstractContextManager[Executor]] = workers) -> int:
    given = options(arguments)
    try:
        arms = [] if given.page_only else asked(given.only)
    except LookupError as error:
        print(error.args[0], file=sys.stderr)
        return 2
    runs = Runs(given.results, measured())
    if given.fresh:
        runs.records = {name: record for name, record in runs.records.items() if ARMS.get(name) not in arms}
    try:
        with pool_of(given.workers) as pool:
            for place, arm in enumerate(arms, 1):
                head = f"study: {arm.name} ({place} of {len(arms)})"
                progress(head)
                runs.run(arm, pool, lambda text, head=head: progress(f"{head}: {text}"))  # type: ignore[misc]
    except KeyboardInterrupt:
        print("\ninterrupted; the same command, without --fresh, goes on from here", file=sys.stderr)
        return 130
    progress("")
    given.page.write_text(page(json.loads(given.results.read_text()) if given.results.exists() else {}))
    print(f"written: {given.page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
