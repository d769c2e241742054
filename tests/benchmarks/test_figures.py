"""Medians with intervals, and processes that take turns."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import alternate
from alternate import alternated
from figures import Figure, figure, ratio


def test_the_interval_of_a_median() -> None:
    """Of 1 to 100, the order statistics 41 and 61 enclose the median with 95 % (0.5 n -+ 0.98 sqrt(n)); of three, all."""
    assert figure(range(1, 101)) == Figure(50.5, 41, 61)
    assert figure([3.0, 1.0, 2.0]) == Figure(2.0, 1.0, 3.0)
    assert figure([4.0]) == Figure(4.0, 4.0, 4.0)
    assert str(figure([1.0, 1.0, 2.0])) == "1.00 (1.00 to 2.00)"


def test_a_ratio_is_taken_round_by_round() -> None:
    """A moment in which both are ten times as slow changes nothing."""
    assert ratio([2.0, 20.0, 2.0], [1.0, 10.0, 1.0]) == Figure(2.0, 2.0, 2.0)


def variant(name: str) -> tuple[Callable[[], None], dict[str, Any]]:
    """For the worker processes of the next test."""
    if name == "fails":
        raise ValueError("no such variant\nand more")
    return lambda: print(f"{name} works"), {"name": name}


def test_each_variant_has_its_turn_in_each_round(monkeypatch: Any) -> None:

    monkeypatch.setattr(alternate, "HERE", os.pathsep.join([str(alternate.HERE), str(Path(__file__).parent)]))
    found = alternated("test_figures:variant", {name: [name] for name in ("one", "two", "fails")}, rounds=3)
    assert [len(found[name].seconds) for name in ("one", "two", "fails")] == [3, 3, 0]
    assert found["one"].facts == {"name": "one"} and all(seconds >= 0 for seconds in found["two"].seconds)
    assert found["fails"].error == "ValueError: no such variant"
