"""Two processes with FSDP2 on each block and on the whole: values, penalties and gradients are those of the module that is not sharded."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from two_shards import WAYS

SCRIPT = Path(__file__).parent / "two_shards.py"


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of the two ranks found."""
    place = tmp_path_factory.mktemp("shards")
    outs = [place / f"rank{rank}.pt" for rank in (0, 1)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parent)}
    commands = [[sys.executable, str(SCRIPT), str(rank), str(place / "store"), str(out)] for rank, out in enumerate(outs)]
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    processes = [subprocess.Popen(command, env=environment, **pipes) for command in commands]
    try:
        for process in processes:
            output, _ = process.communicate(timeout=900)
            assert process.returncode == 0, output
    finally:
        for process in processes:
            process.kill()
    return [torch.load(out) for out in outs]


@pytest.mark.parametrize("way", WAYS)
def test_sharded_is_whole(found: list[dict[str, Any]], way: str) -> None:
    for rank in found:
        ours, theirs = rank[way]
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


def test_without_blocks_the_cure_is_named(found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert rank["without blocks"].startswith("fully_shard was applied to 'layers.0', and the emitted code runs the operations inside")
        assert "blocks='layers.0'" in rank["without blocks"]


def test_contractive_is_refused(found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert "differentiates the model within its forward, and FSDP2 would free" in rank["contractive"]
