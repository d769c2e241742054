"""What the benchmarks share: their arguments, their progress, the rows of their tables."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any


def row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def progress(what: str) -> None:
    """One line that the next overwrites, on a terminal only."""
    if sys.stderr.isatty():
        print(f"\r\033[K{what}", end="", file=sys.stderr, flush=True)


def arguments(about: str | None, *numbers: tuple[str, int], names: Iterable[str]) -> Any:
    """The options of one benchmark: its numbers, and ``--only`` names or globs, which must exist."""
    parser = argparse.ArgumentParser(description=about)
    for name, default in numbers:
        parser.add_argument(name, type=int, default=default)
    parser.add_argument("--only", nargs="+", default=["*"], metavar="GLOB")
    options = parser.parse_args()
    known = list(names)
    for pattern in options.only:
        if not any(fnmatchcase(name, pattern) for name in known):
            near = difflib.get_close_matches(pattern, known, 3, 0.3) or known
            parser.error(f"nothing here is called {pattern!r}; there is {', '.join(map(repr, near))}")
    return options


def chosen(table: Mapping[str, Any], patterns: Iterable[str]) -> dict[str, Any]:
    return {name: value for name, value in table.items() if any(fnmatchcase(name, pattern) for pattern in patterns)}
