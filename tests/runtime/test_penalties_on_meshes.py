"""Penalties on DTensors, in several processes: totals are plain numbers, and totals and gradients are those of the whole module."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from mesh_ranks import WAYS
from rank_processes import results_of

from graphreg.runtime.distributed_values import has_empty_shard, small_shape
from lacking import needs_second_gradients_of_shards

SCRIPT = Path(__file__).parent / "mesh_ranks.py"
NAMES = list(WAYS)
FIRST = ("FSDP2", "tensor parallel", "tensor parallel, twice", "partial sums", "in place, tensor parallel", "formulas")
OTHERS = [name for name in NAMES[: NAMES.index("hybrid")] if name not in FIRST]
FOUR = [*NAMES[NAMES.index("hybrid") :], "formulas"]
NARROW = {"FSDP2, float32": 1e-6, "FSDP2, mixed precision": 1e-6}  # where the module is float32


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return results_of(SCRIPT, 2, tmp_path_factory.mktemp("first"), *FIRST, "errors", timeout=3000)


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return results_of(SCRIPT, 2, tmp_path_factory.mktemp("others"), *OTHERS, timeout=3000)


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return results_of(SCRIPT, 4, tmp_path_factory.mktemp("four"), *FOUR, timeout=3000)


def assert_whole(found: list[dict[str, Any]], way: str) -> None:
    for rank in found:
        ours, theirs = rank[way]
        tolerance = NARROW.get(way, 1e-12)
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("way", [pytest.param(way, marks=needs_second_gradients_of_shards if "twice" in way else ()) for way in FIRST])
def test_two_ranks(first: list[dict[str, Any]], way: str) -> None:
    assert_whole(first, way)


@pytest.mark.parametrize("way", OTHERS)
def test_two_ranks_in_other_ways(others: list[dict[str, Any]], way: str) -> None:
    assert_whole(others, way)


@pytest.mark.parametrize("way", FOUR)
def test_four_ranks(four: list[dict[str, Any]], way: str) -> None:
    assert_whole(four, way)


@pytest.mark.parametrize(
    ("what", "start", "sentence"),
    [
        ("local shard", "hidden_l1 would measure layers.0.sigmoid, of which each rank has a part", "layers.0.up returns it so"),
        ("local shard in a block", "hidden_l1 would measure layers.0.sigmoid", "use_local_output=False, so that the value is a DTensor"),
        ("local shard, compiled", "hidden_l1 would measure layers.0.sigmoid", "Each rank would have a penalty of its own"),
        ("local shard in place", "hidden_l1 would measure layers.0.sigmoid", "or select a value that all ranks have whole"),
        ("local input", "hidden_l1 would measure layers.0.norm", "x returns it so"),
        ("local input of a block", "hidden_l1 would measure layers.0.norm", "x returns it so"),
        ("opened", "parallelize_module was applied to 'layers.0', and the emitted code runs the operations inside", "blocks='layers.0'"),
        ("contractive", "Contractive contractive differentiates the model", "train without parallelize_module"),
        ("backend", "hidden_l1 would measure layers.0.sigmoid", "layers.0.up returns it so"),
    ],
)
def test_what_is_refused(first: list[dict[str, Any]], what: str, start: str, sentence: str) -> None:
    for rank in first:
        assert rank["errors"][what].startswith(start) and sentence in rank["errors"][what]


@pytest.mark.parametrize("what", ["whole value", "whole in a block"])
def test_values_that_ranks_have_whole_are_measured(first: list[dict[str, Any]], what: str) -> None:
    assert all(rank["errors"][what] == "" for rank in first)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8, 64])
@pytest.mark.parametrize("shape", [(1, 4), (5, 7), (8, 6), (4096, 4096), (4097, 64, 3, 3), (50257, 768), (0, 3), ()])
def test_a_trial_is_on_a_smaller_tensor_of_the_same_kind(shape: tuple[int, ...], ranks: int) -> None:
    small = small_shape(shape, ranks)
    for size, new in zip(shape, small, strict=True):
        assert new <= size and (size - new) % ranks == 0
    assert [a < b for a in shape for b in shape] == [a < b for a in small for b in small]
    for dim in range(len(shape)):
        assert has_empty_shard(small, [(dim, ranks)]) == has_empty_shard(shape, [(dim, ranks)])


@pytest.mark.parametrize(
    ("shape", "parts", "empty"),
    [
        ((8, 3), [(0, 4)], False),
        ((5, 3), [(0, 4)], True),  # 2, 2, 1, 0
        ((5, 3), [(0, 3)], False),
        ((9, 3), [(0, 2), (0, 2)], False),  # 5 and 4, then 3, 2, 2, 2
        ((9, 3), [(0, 4), (0, 2)], True),  # 3, 3, 3, 0
        ((5, 3), [(0, 2), (0, 2)], False),  # 3 and 2, then 2, 1, 1, 1
        ((9, 3), [(0, 2), (0, 4)], True),  # 5 and 4, then 2, 2, 1, 0 and 1, 1, 1, 1
        ((8, 3), [(1, 4)], True),
        ((8, 3), [], False),
        ((8, 0), [], True),
    ],
)
def test_empty_shards(shape: tuple[int, ...], parts: list[tuple[int, int]], empty: bool) -> None:
    assert has_empty_shard(shape, parts) == empty
