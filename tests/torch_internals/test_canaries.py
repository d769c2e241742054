"""Each function of ``graphreg/torch_internals`` has a canary: a test on a tiny example that falls when a new torch behaves otherwise."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from graphreg.torch_internals import pytree

HERE = Path(__file__).parent
DOOR = Path(pytree.__file__).parent
# Files that use nothing of torch's that is private, or that have tests of their own.
NO_PART_OF_TORCH = {"interpreter", "patching", "versions"}
NAMES = {"Chunk", "CHUNKED", "DEFAULT", "ModuleStack", "Randomness", "modules_by_path", "quiet", "regions"}


def defined(path: Path) -> Iterator[str]:
    """The public names that a file of ``torch_internals`` defines, or takes from torch for others."""
    for node in ast.parse(path.read_text()).body:
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                yield name
            case ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name)):
                yield name
            case ast.ImportFrom(names=names):
                yield from (each.asname for each in names if each.asname)


def test_each_function_has_a_canary() -> None:
    tested = set[str]().union(*(re.findall(r"\b\w+\.(\w+)", path.read_text()) for path in HERE.glob("test_canaries_*.py")))
    for path in DOOR.glob("*.py"):
        public = {name for name in defined(path) if not name.startswith("_")}
        missing = sorted(public - tested - NAMES) if path.stem not in NO_PART_OF_TORCH else []
        assert not missing, f"{missing} of graphreg/torch_internals/{path.name} have no canary: a new torch would break them in silence"
