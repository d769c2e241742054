"""The measures of benchmarks/house.py, on sources and runs whose numbers are counted by hand."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from house import table
from house_run import changed, held, touched
from house_text import File, Lines, both_write, homonyms, single_callers
from torch import nn

import graphreg

CLOCK = File(
    "runtime/clock.py",
    '''"""Counts calls."""

import math
from typing import Any

Value = float  # an alias is a meaning


class Clock:
    """Has a docstring."""

    def set_strength(self, value: Value) -> None:
        self.value = _checked(value)

    def now(self) -> Any: ...


def _checked(value: Value) -> Value:
    """Short, and used once."""
    # why
    return math.floor(value)


def checked_twice(value: Value) -> Value:
    return _twice(_twice(value))


def _twice(value: Value) -> Value:
    return value
''',
)
BACKEND = File(
    "dynamo_backend/backend.py",
    """class Value:
    pass


class Backend:
    def set_strength(self, value):
        a = 1
        b = 2
        c = 3
        self.value = a + b + c

    def now(self):
        return checked_twice(1)


def checked_twice(value):
    return value
""",
)


def test_names_of_several_meanings() -> None:
    assert homonyms([CLOCK, BACKEND]) == {
        "names of several classes": ["Value: dynamo_backend/backend.py, runtime/clock.py"],
        "names of several public functions": ["checked_twice: dynamo_backend/backend.py, runtime/clock.py"],
    }
    inside = [File(f"integrations/{name}.py", "class Callback: ...") for name in ("lightning", "transformers")]
    assert homonyms(inside)["names of several classes"] == []


def test_methods_that_both_write() -> None:
    assert both_write([CLOCK, BACKEND]) == ["set_strength: Clock in runtime/clock.py"]  # ``now`` is only declared


def test_short_functions_with_one_caller() -> None:
    assert single_callers([CLOCK, BACKEND]) == ["runtime/clock.py:18 _checked"]


def test_lines() -> None:
    counted = Lines.of(CLOCK)
    assert (counted.lines, counted.filled, counted.code, counted.imports, counted.comments) == (29, 17, 13, 2, 2)


def test_what_a_run_touches() -> None:
    found = touched(lambda: graphreg.errors.shown(graphreg.schedules.linear(0, 1, 5)))
    assert "schedules.py" in found["files"]
    assert "graphreg.schedules.Schedule" in found["classes"]
    assert any(function.endswith(" linear") for function in found["functions"])


def test_what_an_object_holds() -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("strength", torch.tensor([0.5, 1.0]))
            self.chosen: dict[str, Any] = {"drop": {"": 0.5}}
            self.again = self

    holder = Holder()
    assert {path[-1]: value for path, value in held(holder)}.items() >= {"chosen": "0.5", "strength": "[0.5, 1.0]"}.items()
    before = dict(held(holder))
    holder.chosen["drop"][""] = 0.25
    assert [path[-1] for path, value in held(holder) if before[path] != value] == ["chosen"]


@pytest.mark.parametrize(
    "new, shown",
    [
        ({"f": len, "callbacks": [], "count": 2}, []),  # a counter is no patch
        ({"f": max, "callbacks": [], "count": 1}, ["f"]),
        ({"f": len, "callbacks": [max], "count": 1}, ["callbacks"]),
        ({"callbacks": [], "count": 1}, ["f"]),
        ({"f": len, "callbacks": [], "count": 1, "g": types.new_class("G")}, ["g"]),
    ],
)
def test_what_was_changed(new: dict[str, Any], shown: list[str]) -> None:
    assert changed({"f": len, "callbacks": [], "count": 1}, new) == shown


def test_the_table() -> None:
    assert table({"names of several classes": "3", "lines": "1,000"}, {"lines": "900"}) == (
        "| measure                  | before | now   | goal |\n"
        "|--------------------------|--------|-------|------|\n"
        "| names of several classes |        | 3     | 0    |\n"
        "| lines                    | 900    | 1,000 |      |"
    )
