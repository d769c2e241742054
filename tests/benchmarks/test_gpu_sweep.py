"""``make gpu``: it says where no GPU is, goes on where it was stopped, and leaves what it has no time for. Nothing is run or timed here."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import gpu
import pytest
import torch


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["gpu.py"])
    monkeypatch.setattr(gpu, "sweep", lambda *args: pytest.fail("it ran"))
    gpu.main()
    assert capsys.readouterr().out.startswith("make gpu: skipped, because torch finds no CUDA GPU")


def test_it_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    path, ran = tmp_path / "gpu.json", list[str]()

    def run(part: str, seconds: float) -> dict[str, Any]:
        ran.append(part)
        return {"error": "no"} if len(ran) == 2 else {"ms": 1.0}

    assert gpu.sweep(["a", "b"], path, 25, run) == []
    assert json.loads(path.read_text())["parts"] == {"a": {"ms": 1.0}, "b": {"error": "no"}}
    assert gpu.sweep(["a", "b", "c"], path, 25, run) == [] and ran == ["a", "b", "b", "c"]  # what failed runs again
    assert gpu.sweep(["a", "b", "c"], path, 25, run) == [] and len(ran) == 4


def test_it_ends_in_time(tmp_path: Path) -> None:
    """A clock that moves ten minutes at each look: the first part begins at 10 of 25 minutes, the second at 20, and the others do not."""
    clock, given = itertools.count(0, 600), list[float]()

    def run(part: str, seconds: float) -> dict[str, Any]:
        given.append(seconds)
        return {}

    assert gpu.sweep(["a", "b", "c", "d"], tmp_path / "gpu.json", 25, run, lambda: float(next(clock))) == ["c", "d"]
    assert given == [900.0, 300.0]


@pytest.mark.parametrize("workload", gpu.WORKLOADS)
def test_the_forms_run(workload: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, in eager, on small inputs."""
    make, shape = gpu.WORKLOADS[workload]
    small = {"MLP": (4, 512), "tra": (2, 8, 256), "bat": (2, 3, 8, 8)}[workload[:3]]
    monkeypatch.setitem(gpu.WORKLOADS, workload, (make, small))
    found = gpu.benchmark(f"{workload}, eager", "cpu", 3)
    assert list(found) == list(gpu.FORMS) and all(each["ms"] > 0 for each in found.values()), found
