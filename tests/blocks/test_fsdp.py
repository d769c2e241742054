"""Two processes with FSDP2 on each block and on the whole: values, penalties and gradients are those of the module that is not sharded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rank_processes import results_of

from two_shards import WAYS

SCRIPT = Path(__file__).parent / "two_shards.py"


FIRST = ("blocks and root", "checkpointed", "whole parameters", "in place", "attached", "kept values")
OTHERS = tuple(way for way in WAYS if way not in FIRST)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return results_of(SCRIPT, 2, tmp_path_factory.mktemp("first"), *FIRST, "errors")


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return results_of(SCRIPT, 2, tmp_path_factory.mktemp("others"), *OTHERS)


def assert_whole(found: list[dict[str, Any]], way: str) -> None:
    for rank in found:
        torch.testing.assert_close(rank[way], found[0]["whole"][way], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("way", FIRST)
def test_sharded_is_whole(found: list[dict[str, Any]], way: str) -> None:
    assert_whole(found, way)


@pytest.mark.parametrize("way", OTHERS)
def test_sharded_is_whole_in_other_ways(others: list[dict[str, Any]], way: str) -> None:
    assert_whole(others, way)


def test_without_blocks_the_cure_is_named(found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert rank["without blocks"].startswith("fully_shard was applied to 'layers.0', and the emitted code runs the operations inside")
        assert "blocks='layers.0'" in rank["without blocks"]


def test_contractive_is_refused(found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert "differentiates the model within its forward, and FSDP2 would free" in rank["contractive"]


@pytest.mark.parametrize(
    ("what", "sentence"),
    [
        ("without blocks in place", "layers.0 has a hook, and in train mode the model runs as a graph"),
        ("contractive in place", "FSDP2 would free parameters and average gradients during that. Leave this penalty out"),
        ("traced when sharded", "it can be traced only while its parameters are whole"),
        ("stripped when sharded", "another library has changed the class of a block of this model to FSDPResidual"),
    ],
)
def test_what_is_refused_in_place(found: list[dict[str, Any]], what: str, sentence: str) -> None:
    assert all(sentence in rank[what] for rank in found)
