"""The protocol is public: every file in passes/, and every example in docs/examples, uses public names alone."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import graphreg
import graphreg.types

TOP = Path(__file__).parents[2]
FILES = sorted(path for path in (TOP / "passes").glob("*.py") if path.name != "__init__.py")
EXAMPLES = sorted((TOP / "docs" / "examples").glob("*.md"))
PUBLIC = {"graphreg": set(graphreg.__all__), "graphreg.types": set(graphreg.types.__all__)}
TEXTS = "".join((TOP / "docs" / f"{name}.md").read_text() for name in ("writing", "learned", "parameters", "randomness"))
METHODS = {"__init__", "forward"}  # those of modules in the examples


def code(path: Path) -> ast.Module:
    text = path.read_text()
    return ast.parse(text if path.suffix == ".py" else "\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL)))


def not_public(tree: ast.Module) -> Iterator[str]:
    """What a file imports or reads that is no public name of graphreg's or torch's, and nothing of its own."""
    own = {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.partition(".")[0] not in {*sys.stdlib_module_names, "torch"}
                        and alias.name != "graphreg")  # fmt: skip
        elif isinstance(node, ast.ImportFrom):
            module = node.module or "."
            if module in PUBLIC:
                yield from (f"{module}.{alias.name}" for alias in node.names if alias.name not in PUBLIC[module])
            elif module.partition(".")[0] not in {*sys.stdlib_module_names, "torch"}:
                yield module
        elif isinstance(node, ast.Attribute):
            private = node.attr.startswith("_") and not node.attr.endswith("__") and node.attr not in own
            of_graphreg = isinstance(node.value, ast.Name) and node.value.id == "graphreg"
            if private or (of_graphreg and node.attr not in PUBLIC["graphreg"]):
                yield f"{ast.unparse(node)}"


@pytest.mark.parametrize("path", [*FILES, *EXAMPLES], ids=lambda path: path.name)
def test_public_names_alone(path: Path) -> None:
    assert list(not_public(code(path))) == []


def test_what_is_not_public_is_found() -> None:
    text = """
import graphreg, networkx, torch
from graphreg import Noise, Penalty, checks
from graphreg.planning import Plan
from graphreg.types import Edit
class A(Penalty):
    def __call__(self, z):
        return self._mine(z) + graphreg.rng.stream(z) + z._base
    def _mine(self, z): return super().__call__(z)
"""
    assert sorted(not_public(ast.parse(text))) == ["graphreg.checks", "graphreg.planning", "graphreg.rng", "networkx", "z._base"]


@pytest.mark.parametrize("path", [*FILES, *EXAMPLES], ids=lambda path: path.name)
def test_what_a_class_declares_is_documented(path: Path) -> None:
    """Each method, each argument of a formula, and each class attribute that is no option stands in a page about writing regularizers."""
    for cls in (node for node in code(path).body if isinstance(node, ast.ClassDef)):
        methods = [node for node in cls.body if isinstance(node, ast.FunctionDef) and node.name not in METHODS]
        names = {method.name for method in methods if not method.name.startswith("_")}
        formulas = [method for method in methods if method.name in ("__call__", "in_eval", "penalty")]
        names |= {argument.arg for method in formulas for argument in method.args.args} - {"self"}
        names |= {target.id for node in cls.body if isinstance(node, ast.Assign) for target in node.targets if isinstance(target, ast.Name)}
        assert [name for name in sorted(names) if not re.search(rf"\b{name}\b[^`]*`", TEXTS)] == []


def test_nineteen_methods_are_written() -> None:
    """Each has a class that is there and a test; the built-in ones are tested above."""
    text = (TOP / "docs" / "not_here.md").read_text()
    section = text.partition("## What the public API can express\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| ([^|]+) \| \[(\w+)\]\((\S+?)\)(.*?) \| \[its test\]\((\S+)\) \|$", section, re.MULTILINE)
    assert len(rows) == len({method for method, *_ in rows}) == 19
    for _, name, file, _, test in rows:
        path = (TOP / "docs" / file).resolve()
        assert path in FILES and f"class {name}(" in path.read_text() if name != "example" else path in EXAMPLES
        assert (TOP / "docs" / test).resolve().exists()
    assert sum(not limit for *_, limit, _ in rows) == 15
