"""What the benchmarks share: their arguments, their progress, the rows of their tables."""

from __future__ import annotations

import argparse
import difflib
import json
import sys
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

BUILD = Path(__file__).resolve().parents[1] / "build" / "bench"


def row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def progress(what: str) -> None:
    """One line that the next overwrites, on a terminal only."""
    if sys.stderr.isatty():
        print(f"\r\033[K{what}", end="", file=sys.stderr, flush=True)


def arguments(about: str | None, *numbers: tuple[str, int | str], names: Iterable[str], switches: Iterable[str] = ()) -> Any:
    """The options of one benchmark: its numbers, its switches, and ``--only`` names or globs, which must exist."""
    parser = argparse.ArgumentParser(description=about)
    for name, default in numbers:
        parser.add_argument(name, type=type(default), default=default)
    for name in switches:
        parser.add_argument(name, action="store_true")
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


def stored(part: str, name: str, data: Any) -> None:
    """Put a result into ``build/bench/PART.json``, beside those that are there, so that a page can be put together from several runs."""
    path = BUILD / f"{part}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    present = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(present | {name: data}, indent=1) + "\n")
