"""How easily graphreg's own source is read: one table of what a call touches, what is written twice, and how the lines are.

    python benchmarks/house.py                            the table
    python benchmarks/house.py --before FOLDER            beside an earlier version, which is installed in FOLDER (pip install --target)
    python benchmarks/house.py --list "functions of a warm call"    the members of a measure, one a line
    python benchmarks/house.py --list names               of each measure whose name has this word

Two minutes, most of which is the import of torch.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from functools import reduce
from operator import add
from pathlib import Path

from house_text import File, Lines, both_write, files, homonyms, single_callers

TOP = Path(__file__).parents[1]
RUN = Path(__file__).with_name("house_run.py")
Members = dict[str, list[str]]
GOALS = {
    "functions of regularize and a call": "450",
    "classes of regularize and a call": "42",
    "files of regularize and a call": "80",
    "functions of a warm call": "45",
    "attributes that hold a strength": "3",
    "names of several classes": "0",
    "methods that modules and backends write": "0",
    "torch changed by an import": "0",
    "torch changed by a trace": "0",
    "functions of one caller, at most three lines": "half of 0.2",
    "characters of a filled line": "45",
    "comments to lines of code": "≥ 0.07",
}


def measured(measure: str, folder: Path | None, *arguments: str) -> Members:
    """What a function of ``house_run.py`` finds in the version in a folder; None is the one that this Python imports."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"} | ({"PYTHONPATH": str(folder)} if folder else {})
    command = [sys.executable, str(RUN), measure, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command[:3])} failed for {folder or TOP}:\n{done.stderr}")
    found: Members = json.loads(done.stdout.splitlines()[-1])
    return found


def members(sources: list[File], folder: Path | None) -> Members:
    """The members of each measure that has members."""
    torch_modules = measured("torch_modules", folder)["modules"]
    return {
        **measured("calls", folder),
        **measured("strength_attributes", folder),
        **homonyms(sources),
        "methods that modules and backends write": both_write(sources),
        **measured("changed_in_torch", folder, json.dumps(torch_modules)),
        "functions of one caller, at most three lines": single_callers(sources),
    }


def numbers(sources: list[File]) -> dict[str, str]:
    """The measures of lines; those of graphreg/ and passes/ together, because an installed version has passes/ in graphreg/."""
    total = reduce(add, map(Lines.of, sources))
    return {
        "lines": f"{total.lines:,}",
        "lines of code": f"{total.code:,}",
        "lines of code without imports": f"{total.code - total.imports:,}",
        "characters of a filled line": f"{total.characters / total.filled:.1f}",
        "comments to lines of code": f"{total.comments / total.code:.3f}",
    }


def version(folder: Path | None) -> list[File]:
    return files(folder / "graphreg", folder / "graphreg" / "passes") if folder else files(TOP / "graphreg", TOP / "passes")


def table(now: dict[str, str], before: dict[str, str] | None) -> str:
    """The measures of now beside those of before, if there are any, and the goals."""
    head = ["measure", *(["before"] if before is not None else []), "now", "goal"]
    rows = [[name, *([before.get(name, "")] if before is not None else []), value, GOALS.get(name, "")] for name, value in now.items()]
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    lines = ["| " + " | ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) + " |" for row in [head, *rows]]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, metavar="FOLDER", help="a folder in which an earlier version is installed")
    parser.add_argument("--list", metavar="MEASURE", help="print the members of the measures that have this in their names")
    options = parser.parse_args()

    def found(folder: Path | None) -> tuple[Members, dict[str, str]]:
        sources = version(folder)
        return members(sources, folder), numbers(sources)

    if options.list is not None:
        shown = {name: lines for name, lines in found(options.before)[0].items() if options.list in name}
        if not shown:
            sys.exit(f"no measure has {options.list!r} in its name")
        print("\n\n".join("\n  ".join([f"{name}: {len(lines)}", *lines]) for name, lines in shown.items()))
        return

    columns = [
        {name: str(len(lines)) for name, lines in listed.items()} | counted
        for listed, counted in map(found, [None, *([options.before] if options.before else [])])
    ]
    print(table(columns[0], columns[1] if options.before else None))


if __name__ == "__main__":
    main()
