"""docs/architecture.md is true of the code: its table lists every file, and a file imports from files above it."""

from __future__ import annotations

import ast
import re
from pathlib import Path

TOP = Path(__file__).parent.parent
ROWS = [line for line in (TOP / "docs" / "architecture.md").read_text().splitlines() if line.startswith("| `")]
ORDER = [name for row in ROWS for name in re.findall(r"`(\w+)\.py`", row.split("|")[1])]


def test_every_file_is_in_the_table_once() -> None:
    files = {path.stem for path in (TOP / "graphreg").glob("*.py")} - {"__init__"}
    assert sorted(ORDER) == sorted(files)


def test_imports_point_up_the_table() -> None:
    for place, name in enumerate(ORDER):
        tree = ast.parse((TOP / "graphreg" / f"{name}.py").read_text())
        for node in tree.body:  # imports for type checkers stand in an ``if`` and are not followed
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("graphreg"):
                package, _, module = (node.module or "").partition(".")
                used = [module] if module else [alias.name for alias in node.names]
                assert package == "graphreg" and all(ORDER.index(other) < place for other in used), (name, used)
