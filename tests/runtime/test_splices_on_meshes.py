"""Splices on DTensors, in several processes: masks are those of the whole value, bit for bit, however the ranks divide it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_processes import results_of
from splice_ranks import WAYS
from torch.utils._pytree import tree_leaves

SCRIPT = Path(__file__).parent / "splice_ranks.py"
NAMES = list(WAYS)
FIRST = NAMES[: NAMES.index("elements, exported")]
OTHERS = NAMES[len(FIRST) :]


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return results_of(SCRIPT, 2, tmp_path_factory.mktemp("first"), *FIRST, "errors")


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return results_of(SCRIPT, 2, tmp_path_factory.mktemp("others"), *OTHERS)


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return results_of(SCRIPT, 4, tmp_path_factory.mktemp("four"), *NAMES)


def assert_whole(found: list[dict[str, Any]], way: str) -> None:
    """Outputs and gradients are equal. Where ranks add up summands of a parameter's gradient, or of a linear layer, they are close."""
    for rank in found:
        ours, theirs = rank[way]
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
        values, expected = (tree_leaves(each) for each in (ours, theirs))
        if way.startswith("norms"):
            values, expected = ([each for each in found if each.dim() > 1] for found in (values, expected))
        if way.startswith("block"):  # which elements a mask has zeroed
            values, expected = ([each == 0 for each in found] for found in (values, expected))
        assert values and all(torch.equal(a, b) for a, b in zip(values, expected, strict=True))
        assert not torch.equal(expected[0], torch.zeros_like(expected[0]))


@pytest.mark.parametrize("way", FIRST)
def test_two_ranks(first: list[dict[str, Any]], way: str) -> None:
    assert_whole(first, way)


@pytest.mark.parametrize("way", OTHERS)
def test_two_ranks_in_other_ways(others: list[dict[str, Any]], way: str) -> None:
    assert_whole(others, way)


@pytest.mark.parametrize("way", NAMES)
def test_four_ranks(four: list[dict[str, Any]], way: str) -> None:
    assert_whole(four, way)


@pytest.mark.parametrize(
    ("what", "sentence"),
    [
        ("strided", "a value is shared among ranks as .*, and splices act on values that are replicated, or divided by Shard"),
        ("one example", "NEFTune at add: ranks divide the value along axis 1, and NEFTune may look at the whole of it"),
        ("whole", "DropBlock at add: ranks divide the value along axis 2, and DropBlock may look at the whole of it"),
    ],
)
def test_what_is_refused(first: list[dict[str, Any]], what: str, sentence: str) -> None:
    assert all(re.match(sentence, rank["errors"][what]) for rank in first)
