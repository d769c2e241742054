"""The Trainer of transformers, Lightning and accelerate on two ranks: with accumulation, a penalty has the share that it has in a batch."""

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
    """Or as often as it has the loss. What regularizers keep is resumed bit for bit."""
    pytest.importorskip(way)
    script = shutil.copy(SCRIPT, tmp_path / f"{way}.py")
    run_ranks(LAUNCHER, 2, 1, script)
    ranks: list[Any] = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    model = Net()
    before = [p.detach().clone() for p in model.parameters()]
    graphreg.regularize(model, weight_l2=WEIGHT, example_inputs=(X, X))(X, X).penalties["weight_l2"].backward()
    for kind, (_, factor) in WAYS[way].items():
        for penalized, plain in (rank[kind] for rank in ranks):
            for ours, theirs, first, parameter in zip(penalized, plain, before, model.parameters(), strict=True):
                assert not torch.equal(theirs, first)  # it was trained
                gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                tolerance = {"rtol": 1e-5, "atol": 1e-6} if factor else {"rtol": 0, "atol": 0}
                torch.testing.assert_close((theirs - ours) / RATE, gradient * factor, **tolerance, msg=f"{kind}: {{}}".format)
        assert all(map(torch.equal, *(rank[kind][0] for rank in ranks))), kind
