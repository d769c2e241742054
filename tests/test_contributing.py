"""CONTRIBUTING.md: its diffs are of the code as it is, and the files and commands that it names are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

TOP = Path(__file__).parents[1]
TEXT = (TOP / "CONTRIBUTING.md").read_text(encoding="utf-8")
DIFFS = re.findall(r"```diff\n--- [^\n]*\n\+\+\+ b/([^\n]*)\n(.*?)```", TEXT, re.DOTALL)


@pytest.mark.parametrize(("file", "diff"), DIFFS, ids=[file for file, _ in DIFFS])
def test_a_diff_has_been_applied(file: str, diff: str) -> None:
    """Each line that it adds or keeps is in the file, in this order; none that it removes."""
    lines = (TOP / file).read_text(encoding="utf-8").splitlines()
    rest = iter(lines)
    for line in diff.splitlines():
        if line.startswith("-"):
            assert line[1:] not in lines
        else:
            assert line[1:] in rest, line  # takes lines up to that one


def test_the_walks_are_there() -> None:
    assert len(DIFFS) > 7
    assert re.findall(r"^### An? (.*)$", TEXT, re.MULTILINE) == ["regularizer", "check", "front end", "drawing", "option", "refusal"]


def test_the_files_that_are_named_are_there() -> None:
    named = set(re.findall(r"`((?:graphreg|passes|tests|docs|examples|\.ci)/[\w./]*)`", TEXT)) | set(re.findall(r"\]\(([\w./]+)\)", TEXT))
    assert len(named) > 25 and [name for name in sorted(named) if not (TOP / name).exists()] == []
    rooms = {path.parent.name for path in (TOP / "graphreg").glob("*/__init__.py")}
    assert rooms <= set(re.findall(r"`graphreg/(\w+)/`", TEXT))
    targets = set(re.findall(r"`make ([\w-]+)", TEXT))
    assert targets and targets <= set(re.findall(r"^([\w-]+):", (TOP / "Makefile").read_text(), re.MULTILINE))


def test_a_folder_of_tests_for_each_room() -> None:
    folders = {path.name for path in (TOP / "tests").iterdir() if path.is_dir()}
    rooms = {path.parent.name for path in (TOP / "graphreg").glob("*/__init__.py")}
    assert rooms - folders <= {"torch_internals"}
    names = [path.name for path in (TOP / "tests").rglob("*.py") if path.name not in ("__init__.py", "__main__.py", "conftest.py")]
    assert sorted(names) == sorted(set(names))  # pytest imports them by their names alone
