"""Attributes whose names are others since 0.1: the old names work, with a warning that points at the caller."""

from __future__ import annotations

import copy
import pickle

import pytest
from torch import nn

import graphreg
from graphreg.passes import BernoulliDropout

MODEL = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Dropout(0.5), nn.Linear(4, 2))
TRACED = graphreg.trace(MODEL)
PLAN = graphreg.plan(TRACED, [BernoulliDropout("1", 0.5)])
BACKEND = graphreg.backend(dropout=0.5)
DIAGNOSIS = graphreg.doctor(graphreg.regularize(MODEL, dropout={"1": 0.5}), backend="eager")


@pytest.mark.parametrize(
    ("owner", "old", "now"),
    [
        (TRACED, "leaves", "opaque_modules"), (TRACED, "held", "specialized"), (TRACED, "own_dropout", "native_dropout"),
        (PLAN, "cones", "slices"), (PLAN, "own", "native_dropout"), (PLAN, "stays", "unmovable"), (PLAN, "census", "site_counts"),
        (BACKEND, "parts", "subgraphs"), (DIAGNOSIS, "about", "subject"),
    ],
)  # fmt: skip
def test_an_old_name_works(owner: object, old: str, now: str) -> None:
    title = type(owner).__name__.removeprefix("Named")
    with pytest.warns(DeprecationWarning, match=rf"^{title}\.{old} is called {title}\.{now} now\.$") as caught:
        assert getattr(owner, old) is getattr(owner, now)
    assert [each.filename for each in caught] == [__file__]


@pytest.mark.parametrize("owner", [TRACED, PLAN, BACKEND, DIAGNOSIS])
def test_a_name_that_never_was_is_an_error_and_copies_work(owner: object) -> None:
    with pytest.raises(AttributeError, match="has no attribute 'whole_story'"):
        _ = owner.whole_story  # type: ignore[attr-defined]
    assert type(copy.copy(owner)) is type(owner)


def test_a_diagnosis_is_pickled() -> None:
    assert pickle.loads(pickle.dumps(DIAGNOSIS)) == DIAGNOSIS
