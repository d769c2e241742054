"""``make matrix``: runs the pairs of Python and torch, one after the other, and writes docs/versions.md after each."""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from matrix.environment import TOP, Environment, Unavailable
from matrix.page import Row, page
from matrix.pairs import Pair, chosen
from matrix.stages import probe, run_tests, share

Tell = Callable[[str], None]


def options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make matrix", description=__doc__)
    parser.add_argument("--only", metavar="PAIRS", help="'3.13 2.15' is one, '3.13' or '2.15' all with that version, a comma joins several")
    parser.add_argument("--fresh", action="store_true", help="run again what an interrupted run has done")
    parser.add_argument("--keep", action="store_true", help="leave the environments in place")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--build", type=Path, default=TOP / "build" / "matrix", metavar="FOLDER", help="where the environments are made")
    parser.add_argument("--results", type=Path, default=TOP / "docs" / "versions.json", metavar="FILE")
    parser.add_argument("--page", type=Path, default=TOP / "docs" / "versions.md", metavar="FILE")
    return parser.parse_args(arguments)


def run_pair(environment: Environment, workers: int, tell: Tell) -> Row:
    """One pair's row. Raises Unavailable."""
    tell("installing")
    environment.make()
    tell("names and streams")
    found = probe(environment)
    tell("tests")
    return found | run_tests(environment, workers)


def row_of(pair: Pair, given: argparse.Namespace, run: Callable[..., Row], tell: Tell) -> Row:
    """A pair's row, with its date; the environment is removed unless the run was interrupted, or asked to keep it."""
    environment = Environment(pair, given.build / f"{pair.python}-{pair.torch}")
    head = {"python": pair.python, "torch": pair.torch, "date": datetime.date.today().isoformat()}
    try:
        row = head | run(environment, given.workers, tell)
    except Unavailable as error:
        row = head | {"reason": str(error)}
    if not given.keep:
        environment.remove()
    return row


def kept(results: Path) -> list[Row]:
    """The rows of earlier runs."""
    return list(json.loads(results.read_text())) if results.exists() else []


def with_row(rows: Sequence[Row], row: Row) -> list[Row]:
    """The rows with one in the place of an older one of its pair. A measured row is kept where the pair cannot be had now."""
    older = next((each for each in rows if (each["python"], each["torch"]) == (row["python"], row["torch"])), None)
    if older is not None and "reason" in row and "reason" not in older:
        return list(rows)
    return [*(each for each in rows if each is not older), row]


def left(pairs: Sequence[Pair], unfinished: Path, fresh: bool) -> list[Pair]:
    """The pairs that an interrupted run of the same pairs has left; all of them where there is none."""
    wanted = [list(pair) for pair in pairs]
    if not fresh and unfinished.exists():
        run = json.loads(unfinished.read_text())
        if run["pairs"] == wanted:
            return [pair for pair in pairs if list(pair) not in run["done"]]
    return list(pairs)


def summary(row: Row) -> str:
    """A row as a line."""
    if "reason" in row:
        return f"not run: {row['reason']}"
    wrong = sum(answer is not True for answer in row.get("answers", {}).values())
    text = f"{row['passed']} passed, {len(row['failed'])} failed, {sum(row['skipped'].values())} skipped"
    return text + f", {wrong} known answers wrong" * bool(wrong) + f", {row.get('error')}" * ("error" in row)


def good(row: Row) -> bool:
    """Whether a row is without a failure; a pair that cannot be had is none."""
    return "reason" in row or not (row["failed"] or "error" in row or any(each is not True for each in row["answers"].values()))


def main(arguments: Sequence[str] | None = None, run: Callable[..., Row] = run_pair) -> int:
    given = options(arguments)
    try:
        pairs = chosen(given.only)
    except LookupError as error:
        print(error.args[0], file=sys.stderr)
        return 2
    unfinished = given.build / "unfinished.json"
    given.build.mkdir(parents=True, exist_ok=True)
    waiting, rows = left(pairs, unfinished, given.fresh), list[Row]()
    for place, pair in enumerate(waiting):
        try:
            with progress(f"{pair} ({place + 1} of {len(waiting)})", given.build / f"{pair.python}-{pair.torch}" / "tests.log") as tell:
                row = row_of(pair, given, run, tell)
        except KeyboardInterrupt:
            print("interrupted; the same command goes on from here", file=sys.stderr)
            return 130
        rows.append(row)
        everything = with_row(kept(given.results), row)
        given.results.write_text(json.dumps(everything, indent=1) + "\n")
        given.page.write_text(page(everything))
        done = [list(each) for each in pairs if each not in waiting[place + 1 :]]
        unfinished.write_text(json.dumps({"pairs": [list(each) for each in pairs], "done": done}))
        print(f"{pair}: {summary(row)}", flush=True)
    unfinished.unlink(missing_ok=True)
    print(f"written: {given.page}")
    return int(not all(map(good, rows)))


@contextmanager
def progress(title: str, log: Path) -> Iterator[Tell]:
    """Show on a terminal what is being done, for how long, and how far the tests are; nothing in a pipe."""
    if not sys.stderr.isatty():
        yield lambda text: None
        return
    begin, ended, doing = datetime.datetime.now(), threading.Event(), ["starting"]
    thread = threading.Thread(target=partial(_shown, title, log, begin, ended, doing), daemon=True)
    thread.start()
    try:
        yield doing.append
    finally:
        ended.set()
        thread.join()


def _shown(title: str, log: Path, begin: datetime.datetime, ended: threading.Event, doing: list[Any]) -> None:
    while not ended.wait(1):
        took = str(datetime.datetime.now() - begin).partition(".")[0]
        far = share(log) if doing[-1] == "tests" else ""
        sys.stderr.write(f"\r\x1b[K{title}: {doing[-1]} {far} {took}")
        sys.stderr.flush()
    sys.stderr.write("\r\x1b[K")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
