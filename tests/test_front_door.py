"""``graphreg``'s public names are imported when they are asked for, and are the same whatever was imported before."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import graphreg

SOURCE = Path(graphreg.__file__).read_text()


def for_type_checkers() -> dict[str, tuple[str, ...]]:
    (block,) = (node for node in ast.parse(SOURCE).body if isinstance(node, ast.If))
    return {
        str(node.module).removeprefix("graphreg."): tuple(alias.name for alias in node.names)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
    }


def test_the_three_lists_are_one() -> None:
    assert for_type_checkers() == graphreg._PLACES
    assert sorted(name for names in graphreg._PLACES.values() for name in names) == sorted(graphreg.__all__)


def test_each_name_is_that_of_its_file() -> None:
    for place, names in graphreg._PLACES.items():
        module = importlib.import_module(f"graphreg.{place}")
        assert all(getattr(graphreg, name) is getattr(module, name) for name in names)
    assert set(graphreg.__all__) <= set(dir(graphreg))


def test_what_is_not_there() -> None:
    with pytest.raises(AttributeError, match="module 'graphreg' has no attribute 'regularise'"):
        graphreg.regularise  # noqa: B018


ALONE = """
import sys
import graphreg, graphreg.cli, graphreg.registry
print("torch" in sys.modules)
from graphreg.plan import Plan
import graphreg.trace, graphreg.passes
print(type(graphreg.plan).__name__, type(graphreg.trace).__name__, type(graphreg.passes).__name__, type(graphreg.registry).__name__)
"""


def test_a_function_stays_one_where_its_file_has_its_name() -> None:
    """Python would put the submodule in its place; and none of it needs torch before it is asked for."""
    done = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["False", "function function module module"]
