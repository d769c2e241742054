"""``make zoo``, ``make zoo-libraries``: runs what has not run yet, and writes the page once all has.

The records are kept beside the page, so that a run goes on from there on another machine, too.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import sys
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from zoo.providers import provider
from zoo.run import Limits, Record, failure_lines, kept, passes, sweep
from zoo.table import page

TOP = Path(__file__).parents[2]


def options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make zoo", description=__doc__)
    parser.add_argument("--only", nargs="+", metavar="GLOB", help="models by name, with or without their provider: 'timm/*' resnet18")
    parser.add_argument("--fresh", action="store_true", help="run again what has run")
    parser.add_argument("--failed", action="store_true", help="run again what has failed")
    parser.add_argument("--unfinished", action="store_true", help="write the page though models are left to run")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=600, help="for one model")
    parser.add_argument("--memory", type=float, default=11, help="GiB, for one model")
    parser.add_argument("--models", default="zoo.models", metavar="MODULE", help="where PROVIDERS, PACKAGES and INTRODUCTION stand")
    parser.add_argument("--results", type=Path, default=TOP / "docs" / "models.jsonl")
    parser.add_argument("--page", type=Path, default=TOP / "docs" / "models.md")
    return parser.parse_args(arguments)


def listed(module: str) -> dict[str, str]:
    """Every model of every provider, as ``provider/name``, with the family it stands for."""
    sources = importlib.import_module(module).PROVIDERS
    return {f"{source}/{name}": family for source in sources for name, family in provider(module, source).names().items()}


def passed_over(module: str) -> dict[str, Mapping[str, str]]:
    """What each provider leaves out, with the reason."""
    return {source: provider(module, source).skipped() for source in importlib.import_module(module).PROVIDERS}


def chosen(names: Iterable[str], globs: Sequence[str] | None) -> list[str]:
    """The names that the globs mean, with or without the provider; LookupError for a glob that means none."""
    names = list(names)
    if globs is None:
        return names
    found: dict[str, None] = {}
    for glob in globs:
        matching = [n for n in names if fnmatchcase(n, glob) or fnmatchcase(n.partition("/")[2], glob)]
        if not matching:
            raise LookupError(f"--only {glob!r} is no model of the zoo.{_near(glob, names)}")
        found.update(dict.fromkeys(matching))
    return [name for name in names if name in found]


def _near(glob: str, names: Sequence[str]) -> str:
    bare = {name.partition("/")[2]: name for name in names} | {name: name for name in names}
    near = dict.fromkeys(bare[word] for word in difflib.get_close_matches(glob.strip("*?"), bare, n=5))
    return f" Near names: {', '.join(near)}." if near else ""


def run(module: str, names: Sequence[str], given: argparse.Namespace, console: Console) -> None:
    """Sweep with a progress bar on a terminal and without a word in a pipe."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("zoo", total=len(names))

        def tell(record: Record) -> None:
            progress.advance(task)
            for line in failure_lines(record) if console.is_terminal else ():
                progress.console.print(f"{record['name']}, {line}", markup=False, highlight=False)

        limits = Limits(given.seconds, int(given.memory * 2**30))
        sweep(module, names, given.results, given.workers, limits, tell)


def summary(records: Mapping[str, Record]) -> str:
    failed = [f"{name}, {line}" for name, record in records.items() for line in failure_lines(record)]
    return "\n".join([*failed, f"{sum(map(passes, records.values()))} of {len(records)} models pass every column"])


def main(arguments: Sequence[str] | None = None) -> int:
    given = options(arguments)
    names = listed(given.models)
    try:
        wanted = chosen(names, given.only)
    except LookupError as error:
        print(error.args[0], file=sys.stderr)
        return 2
    before = kept(given.models, given.results)
    again = [n for n in wanted if given.fresh or n not in before or (given.failed and not passes(before[n]))]
    try:
        run(given.models, again, given, Console(stderr=True))
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    records = kept(given.models, given.results)
    print(summary({name: records[name] for name in wanted}))
    left = [name for name in names if name not in records]
    if left:
        stays = "" if given.unfinished else f": {given.page.name} is left as it is"
        print(f"{len(left)} of the zoo's {len(names)} models have not run{stays}")
    if given.unfinished or not left:
        given.page.write_text(page(names, records, passed_over(given.models), importlib.import_module(given.models).INTRODUCTION))
        print(f"written: {given.page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
