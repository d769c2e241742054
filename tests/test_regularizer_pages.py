"""docs/regularizers: each built-in class has a page with the parts that a reader looks for, and what a page says of the class is true."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

import graphreg
from graphreg import Penalty, Regularizer, Splice
from graphreg.regularizer.base import NotGiven
from pages import printed_by, registry_restored

TOP = Path(__file__).parents[1]
FOLDER = TOP / "docs" / "regularizers"
CLASSES = sorted({cls for cls in graphreg.registered().values() if cls.__module__.startswith("graphreg.passes.")}, key=str)
PARTS = ["Formula", "Where it acts", "Options", "Before and after", "When to use it", "Other implementations"]
ROLES = ("hidden", "input", "output")
OF_ALL = {field.name for base in (Regularizer, Penalty, Splice) for field in fields(base)} - {"weight"}


def page(cls: type[Any]) -> str:
    return (FOLDER / f"{cls.keys[0]}.md").read_text()


def part(text: str, title: str) -> str:
    return text.partition(f"\n## {title}\n")[2].partition("\n## ")[0].strip()


def test_no_page_is_for_something_that_does_not_exist() -> None:
    assert len(CLASSES) == 37
    assert sorted(path.stem for path in FOLDER.glob("*")) == sorted(cls.keys[0] for cls in CLASSES)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.keys[0])
def test_a_page_has_its_parts(cls: type[Any]) -> None:
    text = page(cls)
    assert text.startswith(f"# {cls.__name__}\n") and re.findall(r"^## (.*)$", text, re.MULTILINE) == PARTS
    assert all(part(text, title) for title in PARTS)
    assert 40 <= len(text.splitlines()) <= 80
    keywords = re.findall(r"`(\w+)`", re.findall(r"^Keywords?: (.*?)\. \[Code\]", text, re.MULTILINE)[0])
    assert set(cls.keys) <= set(keywords) <= {*cls.keys, *(f"{role}_{key}" for role in ROLES for key in cls.keys)}
    file = cls.__module__.rpartition(".")[2]
    assert f"[Code](../../passes/{file}.py), [tests](../../tests/passes/test_{file}.py)" in text


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.keys[0])
def test_the_options_are_those_of_the_class(cls: type[Any]) -> None:
    """Each option but those of every regularizer has a row, with its default."""
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \| .+? \| .+? \|$", part(page(cls), "Options"), re.MULTILINE)
    told = {name: "required" if default == "required" else eval(default.strip("`")) for name, default in rows}
    # Pages call the field ``weight`` by its other name.
    options = {"strength" if field.name == "weight" else field.name: field.default for field in fields(cls) if field.name not in OF_ALL}
    assert told == {name: "required" if default is NotGiven.OPTION else default for name, default in options.items()}


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.keys[0])
def test_the_source_is_that_of_the_docstring(cls: type[Any]) -> None:
    """The first author and the year of what the docstring cites stand in the formula's part."""
    source = " ".join(str(cls.__doc__).partition("Source: ")[2].split())
    author, year = re.findall(r"[A-Z]\w+", source)[0], re.findall(r"(?:19|20)\d\d", f"{source} 2017")[0]
    formula = part(page(cls), "Formula")
    assert "Source: " in formula
    assert author in formula or source.startswith("theanets")
    assert year in formula or cls.__name__ == "RecurrentState"


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.keys[0])
def test_the_example_prints_what_the_page_shows(cls: type[Any]) -> None:
    """It shows lines that were added, and lines that were there before; the additions are those of this class."""
    text = page(cls)
    with registry_restored():
        found = list(printed_by(text, f"{cls.keys[0]}.md"))
    assert [printed for printed, _ in found] == [shown for _, shown in found] and found
    shown = part(text, "Before and after")
    assert re.search(rf"^\+# \w+: {cls.__name__} ", shown, re.MULTILINE)
    assert re.search(r"^-    ", shown, re.MULTILINE) and "graphreg_rules." in shown
