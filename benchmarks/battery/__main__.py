"""``make rng-battery``: runs what has not run yet, and writes the tables of what has.

A run that was stopped goes on. What did not pass is run again on other words with ten times the samples.
"""

from __future__ import annotations

import argparse
import multiprocessing
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from page import progress

from battery.cases import Case, cases, every_test, waiting
from battery.page import put, section
from battery.run import sweep
from battery.words import CHUNK, NAMES, STREAMS, chunk

TOP = Path(__file__).parents[2]


def options(arguments: Sequence[str] | None) -> argparse.Namespace:
    known = sorted({test for test, _ in every_test()})
    parser = argparse.ArgumentParser(prog="make rng-battery", description=__doc__)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--tests", type=int, nargs="+", choices=known, metavar="N", default=known, help="by dieharder's numbers")
    parser.add_argument("--streams", nargs="+", choices=STREAMS, default=list(STREAMS))
    parser.add_argument("--report", action="store_true", help="run nothing, write the tables of what has run")
    parser.add_argument("--results", type=Path, default=TOP / "build" / "battery")
    parser.add_argument("--page", type=Path, default=TOP / "docs" / "randomness.md")
    return parser.parse_args(arguments)


def table_of_names(pool: ProcessPoolExecutor, folder: Path) -> None:
    count = NAMES // CHUNK
    for number, _ in enumerate(pool.map(chunk, [folder] * count, range(count)), 1):
        progress(f"names hashed: {number * CHUNK:,} of {NAMES:,}")


def run(given: argparse.Namespace) -> None:
    chosen = [case for case in cases(given.streams) if case.test in given.tests]
    left: list[Case] = waiting(chosen, given.results)
    with ProcessPoolExecutor(given.workers, multiprocessing.get_context("spawn")) as pool:
        if any(case.stream == "over sites" for case in left):
            table_of_names(pool, given.results)
        for case, count in sweep(pool, given.workers, left, given.results):
            progress(f"{case.stream}: {' '.join(case.command)} has run, {count} to go")
    progress("")


def main(arguments: Sequence[str] | None = None) -> int:
    given = options(arguments)
    if shutil.which("dieharder") is None:
        print("dieharder is not installed. On Debian and Ubuntu: apt-get install dieharder", file=sys.stderr)
        return 2
    given.results.mkdir(parents=True, exist_ok=True)
    if not given.report:
        try:
            run(given)
        except KeyboardInterrupt:
            print("interrupted; the same command goes on from here", file=sys.stderr)
            return 130
    listing = subprocess.run(["dieharder", "-l"], capture_output=True, text=True, check=True).stdout
    version = re.search(r"version (\S+)", listing)
    text = section(given.results, version[1] if version else "of unknown version")
    (given.results / "section.md").write_text(text)
    print(f"written: {given.results / 'section.md'}")
    if given.page.exists():
        given.page.write_text(put(text, given.page.read_text()))
        print(f"written: {given.page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
