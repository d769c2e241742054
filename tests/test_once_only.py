"""What two places need stands in one: no six lines of code are in graphreg twice, and what is written to nodes is written by one file."""

from __future__ import annotations

import ast
import functools
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

TOP = Path(__file__).parent.parent
LINES = 6
BY_HAND = {"ir/metadata.py"}  # whose own this is


def sources() -> dict[str, str]:
    folder = TOP / "graphreg"
    return {path.relative_to(folder).as_posix(): path.read_text() for path in sorted(folder.rglob("*.py"))}


@functools.cache
def code_lines(source: str) -> list[tuple[int, str]]:
    """The lines that do something: their number and the text.

    Comments, docstrings, imports, ``__all__``, lone brackets and the parameters of functions are left out: functions with the same
    options name them alike.
    """
    lines = source.splitlines()
    left_out: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        names = [target.id for target in node.targets if isinstance(target, ast.Name)] if isinstance(node, ast.Assign) else []
        if docstring or isinstance(node, (ast.Import, ast.ImportFrom)) or "__all__" in names:
            assert isinstance(node, ast.stmt) and node.end_lineno is not None
            left_out.update(range(node.lineno, node.end_lineno + 1))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            left_out.update(range(node.lineno, node.body[0].lineno))
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    texts = ((number, " ".join(line.split())) for number, line in enumerate(lines, 1) if number not in left_out)
    return [(number, text) for number, text in texts if re.search(r"\w", text)]


def repeated(texts: dict[str, str]) -> Iterator[str]:
    """Each pair of places that share six lines, once, where it begins."""
    seen: dict[tuple[str, ...], tuple[str, int, int]] = {}
    for name, source in texts.items():
        lines, told = code_lines(source), -LINES
        for i in range(len(lines) - LINES + 1):
            window = tuple(text for _, text in lines[i : i + LINES])
            other, number, place = seen.setdefault(window, (name, lines[i][0], i))
            if (other == name and i - place < LINES) or i - told < LINES:
                continue
            told = i
            yield f"{name}:{lines[i][0]} and {other}:{number}"


TWICE = "def f(x):\n    a = x\n    e = a\n    b = a\n    c = b\n    d = c\n    return d\n"


@pytest.mark.parametrize(
    ("first", "second", "count"),
    [
        (TWICE, TWICE, 1),
        (TWICE, TWICE.replace("c = b", "c = b  # another comment").replace("(x):\n", '(x):\n    """Another docstring."""\n\n'), 1),
        (TWICE, TWICE.replace("c = b", "c = b + 1"), 0),
        ("import a\nimport b\nimport c\nimport d\nimport e\nimport f\n",) * 2 + (0,),
        (TWICE + "\n\n" + TWICE, "", 1),
    ],
)
def test_the_count(first: str, second: str, count: int) -> None:
    assert len(list(repeated({"first": first, "second": second}))) == count


def test_no_six_lines_stand_twice() -> None:
    assert list(repeated(sources())) == []


def test_what_is_written_to_nodes_goes_through_its_file() -> None:
    """``node.meta["site"]`` and ``node.meta["graphreg"]`` are read and written by functions with types."""
    by_hand = re.compile(r"""meta(?:\.get\(|\.pop\(|\[)\s*["'](?:site|graphreg)["']|["'](?:site|graphreg)["'] (?:not )?in \w+\.meta""")
    found = [
        f"{name}:{number}"
        for name, source in sources().items()
        for number, text in code_lines(source)
        if name not in BY_HAND and by_hand.search(text)
    ]
    assert found == []
