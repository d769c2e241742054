"""The Trainer of transformers, Lightning and accelerate on two ranks: with accumulation, a step has the penalty once."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_processes import run_ranks
from trained_ranks import RATE, WAYS, WEIGHT, Net, X

import graphreg

SCRIPT, LAUNCHER = (Path(__file__).with_name(name) for name in ("trained_ranks.py", "as_torchrun.py"))


@pytest.mark.parametrize("way", WAYS)
def test_a_step_has_the_penalty_once(way: str, tmp_path: Path) -> None:
    pytest.importorskip(way.partition("_")[0])
    script = shutil.copy(SCRIPT, tmp_path / f"{way}.py")
    run_ranks(LAUNCHER, 2, 1, script)
    found: list[Any] = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    model = Net()
    before = [p.detach().clone() for p in model.parameters()]
    graphreg.regularize(model, weight_l2=WEIGHT, example_inputs=(X, X))(X, X).penalties["weight_l2"].backward()
    for penalized, plain in found:
        for ours, theirs, first, parameter in zip(penalized, plain, before, model.parameters(), strict=True):
            assert not torch.equal(theirs, first)  # it was trained
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            torch.testing.assert_close((theirs - ours) / RATE, gradient, rtol=1e-5, atol=1e-6)
    assert all(map(torch.equal, *(penalized for penalized, _ in found)))
