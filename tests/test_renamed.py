"""Attributes whose names are others since 0.1: the old names work, with a warning that points at the caller."""

from __future__ import annotations

import copy
import pickle
from functools import cache

import pytest
from torch import nn

import graphreg
from graphreg.passes import BernoulliDropout

MODEL = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Dropout(0.5), nn.Linear(4, 2))


@cache
def owner(kind: str) -> object:
    """One of the objects that have old names; they are not made before a test runs, for the doctor compiles."""
    if kind == "traced":
        return graphreg.trace(MODEL)
    if kind == "plan":
        return graphreg.plan(graphreg.trace(MODEL), [BernoulliDropout("1", 0.5)])
    if kind == "backend":
        return graphreg.backend(dropout=0.5)
    return graphreg.doctor(graphreg.regularize(MODEL, dropout={"1": 0.5}), backend="eager")


@pytest.mark.parametrize(
    ("kind", "old", "now"),
    [
        ("traced", "leaves", "opaque_modules"), ("traced", "held", "specialized"), ("traced", "own_dropout", "native_dropout"),
        ("plan", "cones", "slices"), ("plan", "own", "native_dropout"), ("plan", "stays", "unmovable"), ("plan", "census", "site_counts"),
        ("backend", "parts", "subgraphs"), ("diagnosis", "about", "subject"),
    ],
)  # fmt: skip
def test_an_old_name_works(kind: str, old: str, now: str) -> None:
    renamed = owner(kind)
    title = type(renamed).__name__.removeprefix("Named")
    with pytest.warns(DeprecationWarning, match=rf"^{title}\.{old} is called {title}\.{now} now\.$") as caught:
        assert getattr(renamed, old) is getattr(renamed, now)
    assert [each.filename for each in caught] == [__file__]


@pytest.mark.parametrize("kind", ["traced", "plan", "backend", "diagnosis"])
def test_a_name_that_never_was_is_an_error_and_copies_work(kind: str) -> None:
    renamed = owner(kind)
    with pytest.raises(AttributeError, match="has no attribute 'whole_story'"):
        _ = renamed.whole_story  # type: ignore[attr-defined]
    assert type(copy.copy(renamed)) is type(renamed)


def test_a_diagnosis_is_pickled() -> None:
    diagnosis = owner("diagnosis")
    assert pickle.loads(pickle.dumps(diagnosis)) == diagnosis
