"""``over_batch`` says of a penalty that it is not the mean of the penalties of the parts of a batch; it is measured here."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import graphreg
from graphreg import Penalty, passes

SEQUENCES = {passes.RecurrentNorm, passes.RecurrentState}
OPTIONS: dict[type[Any], dict[str, Any]] = {passes.Contractive: {"estimator": "exact", "always": True}}
PENALTIES = [kind for name in passes.__all__ if issubclass(kind := getattr(passes, name), Penalty) and kind.on == "values"]


@pytest.mark.parametrize("kind", PENALTIES)
def test_of_a_batch_and_of_its_halves(kind: type[Any]) -> None:
    torch.manual_seed(0)
    shape = (8, 5, 4) if kind in SEQUENCES else (8, 4)
    selector = "2" if kind.default_role == "output" else "1"
    model = nn.Sequential(nn.Linear(4, 6), nn.Sigmoid(), nn.Linear(6, 3)).double()
    module = graphreg.regularize(model, kind(selector, 0.5, **OPTIONS.get(kind, {})))
    x = torch.randn(shape, dtype=torch.double)
    whole, *halves = (next(iter(module(part).penalties.values())) for part in (x, x[:4], x[4:]))
    assert torch.allclose(whole, sum(halves) / 2, rtol=1e-12) != kind.over_batch
