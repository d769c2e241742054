"""``make suites``: runs the tests of timm and transformers that have not run yet, and writes docs/suites.md."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from suites.page import page, results, summary, unexplained
from suites.run import Limits, Log, forget, log_of, sweep, versions
from suites.suites import SUITES, Missing, Suite, sources

TOP = Path(__file__).parents[2]


def options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make suites", description=__doc__)
    parser.add_argument("--only", nargs="+", metavar="GLOB", default=["*"], help=f"these suites: {', '.join(s.name for s in SUITES)}")
    parser.add_argument("--sources", type=Path, metavar="FOLDER", help="has timm/ and transformers/; what is not there is fetched")
    parser.add_argument("--note", help="a sentence on the sources, for the page")
    parser.add_argument("--failed", action="store_true", help="run again, with models in place, the tests that failed with them")
    parser.add_argument("--fresh", action="store_true", help="run again, with models in place, all tests")
    parser.add_argument("--page", action="store_true", help="run nothing; write the page of what has run")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--shard", type=int, default=200, help="tests in one process")
    parser.add_argument("--seconds", type=int, default=600, help="for one test")
    parser.add_argument("--memory", type=float, default=11, help="GiB, for one process")
    parser.add_argument("--build", type=Path, default=TOP / "build" / "suites", metavar="FOLDER")
    parser.add_argument("--docs", type=Path, default=TOP / "docs", metavar="FOLDER", help="where suites.json and suites.md are written")
    return parser.parse_args(arguments)


def chosen(globs: Sequence[str]) -> list[Suite]:
    """The suites that the globs mean. Raises LookupError for a glob that means none."""
    for glob in globs:
        if not any(fnmatchcase(suite.name, glob) for suite in SUITES):
            raise LookupError(f"--only {glob!r} is no suite. There are {', '.join(suite.name for suite in SUITES)}.")
    return [suite for suite in SUITES if any(fnmatchcase(suite.name, glob) for glob in globs)]


def run(suite: Suite, given: argparse.Namespace) -> None:
    """Sweep with a line of progress on a terminal, and without a word in a pipe."""

    def tell(log: Log) -> None:
        if sys.stderr.isatty():
            plain, in_place = len(log.ended("plain")), len(log.ended("in place"))
            line = f"{suite.name}: {plain} of {len(log.tests())} tests have run on plain models, {in_place} in place"
            print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)

    if given.failed or given.fresh:
        forget(log_of(suite, given.build), passed=given.fresh)
    limits = Limits(given.seconds, int(given.memory * 2**30), given.shard)
    sweep(suite, sources(suite.library, given.sources or given.build / "sources"), given.build, limits, given.workers, tell)
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    given = options(arguments)
    try:
        wanted = chosen(given.only)
    except LookupError as error:
        print(error.args[0], file=sys.stderr)
        return 2
    kept = given.docs / "suites.json"
    found = json.loads(kept.read_text()) if kept.exists() else {}
    if found.get("versions") != versions():
        found = {}
    for suite in wanted:
        try:
            if not given.page:
                run(suite, given)
        except KeyboardInterrupt:
            print("interrupted; the same command goes on from here", file=sys.stderr)
            return 130
        except (Missing, RuntimeError) as error:
            print(error, file=sys.stderr)
            return 2
        if log_of(suite, given.build).tests():
            found = results(found, suite, log_of(suite, given.build), given.note)
            kept.write_text(json.dumps(found, indent=1) + "\n")
            (given.docs / "suites.md").write_text(page(found))
            print(summary(found, suite.name))
    print(f"written: {given.docs / 'suites.md'}")
    return 1 if any(unexplained(found, suite.name) for suite in wanted) else 0


if __name__ == "__main__":
    sys.exit(main())
