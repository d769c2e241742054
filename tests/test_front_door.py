"""``graphreg``'s public names are imported when they are asked for; test_nothing_patched.py has that torch is, too."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

import graphreg
import graphreg.types

SOURCE = Path(graphreg.__file__).read_text()


def for_type_checkers() -> dict[str, tuple[str, ...]]:
    """The public names by their files, as a type checker reads them."""
    (block,) = (node for node in ast.parse(SOURCE).body if isinstance(node, ast.If))
    return {
        str(node.module).removeprefix("graphreg."): tuple(alias.name for alias in node.names)
        for node in block.body
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("graphreg.")
    }


def test_the_three_lists_are_one() -> None:
    assert for_type_checkers() == graphreg._FILES
    assert sorted([*graphreg._MODULES, *(name for names in graphreg._FILES.values() for name in names)]) == graphreg.__all__


def test_each_name_is_that_of_its_file() -> None:
    for file, names in graphreg._FILES.items():
        module = importlib.import_module(f"graphreg.{file}")
        assert all(getattr(graphreg, name) is getattr(module, name) for name in names)


def test_nothing_else_shows() -> None:
    """Neither what the file imports, nor the rooms that have been imported by now."""
    assert "errors" in vars(graphreg) and "TYPE_CHECKING" in vars(graphreg)
    assert dir(graphreg) == sorted([*graphreg.__all__, "__version__"])


def test_types_has_every_record() -> None:
    """Those that are public, and what else a function takes or gives; each in the table of its docstring."""
    records = {"Diagnosis", "Diff", "Finding", "Monitor", "Plan", "Regularized", "Report", "Samples", "Selector", "Site", "Traced"}
    assert records <= set(graphreg.types.__all__) & set(graphreg.__all__)
    assert all(getattr(graphreg.types, name) is getattr(graphreg, name) for name in records)
    assert [name for name in graphreg.types.__all__ if f"`{name}`" not in str(graphreg.types.__doc__)] == []


def test_what_is_not_there() -> None:
    with pytest.raises(AttributeError, match="module 'graphreg' has no attribute 'regularise'"):
        graphreg.regularise  # noqa: B018
