"""The console blocks of docs/cli.md and docs/start.md: ``python tests/cli/cli_page.py`` runs their commands and writes what they print."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from graphreg.cli.main import main

TOP = Path(__file__).parents[2]
PAGES = ("docs/cli.md", "docs/start.md")
CONSOLE = re.compile(r"```console\n(.*?)```", re.DOTALL)
FILE = re.compile(r"`(\w+\.py)`:\n\n```python\n(.*?)```", re.DOTALL)


def filled(page: str) -> str:
    """The page with each block's output as it is now, run in a folder with the page's own files in it."""
    with _folder() as folder:
        for name, code in FILE.findall(page):
            (folder / name).write_text(code)
        loaded = set(sys.modules)
        try:
            return CONSOLE.sub(lambda block: f"```console\n{_played(block[1])}```", page)
        finally:
            for name in {Path(name).stem for name, _ in FILE.findall(page)} - loaded:
                sys.modules.pop(name, None)


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        yield Path(folder)


def _played(block: str) -> str:
    """Each ``$ command`` of a block with what it prints."""
    commands = [line for line in block.splitlines() if line.startswith("$ ")]
    return "".join(f"{line}\n{_output(line.removeprefix('$ '))}" for line in commands)


def _output(command: str) -> str:
    program, *arguments = shlex.split(command)
    assert program == "graphreg", command
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        main(arguments)
    return printed.getvalue().replace("addmm: mat1", "mat1")  # as torch 2.15 begins that message


if __name__ == "__main__":
    os.environ.pop("COLUMNS", None)
    for name in PAGES:
        (TOP / name).write_text(filled((TOP / name).read_text()))
