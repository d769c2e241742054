"""The ways in which the sample of other libraries is used: all agree on a model of our own, and a wrong step is told."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from zoo.samples import WAYS, Sample, answers
from zoo.subject import Failed


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Dropout(0.2)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def test_each_way_agrees(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda module, **options: compiled(module, backend="aot_eager", **options))
    sample = Sample(Net(), (torch.randn(3, 4),))
    assert dict(zip(WAYS, answers("net", sample), strict=True)) == {**dict.fromkeys(WAYS, "yes"), "blocks": "`layers.*`"}
    one = nn.Sequential(nn.Linear(4, 2), nn.ReLU())
    assert answers("one", Sample(one, (torch.randn(3, 4),)))[1] == "n/a"


@pytest.mark.parametrize(("what", "told"), [("outputs", "output 0"), ("penalties", "penalty hidden_l1"), ("gradients", "gradient layers")])
def test_a_step_that_differs_is_told(what: str, told: str) -> None:
    torch.manual_seed(0)
    expected = Sample(Net(), (torch.randn(3, 4),)).expected
    own: Any = getattr(expected, what)
    other = [each + 1e-3 for each in own] if what == "outputs" else {name: each + 1e-3 for name, each in own.items()}
    with pytest.raises(Failed, match=rf"^{told}.* differs by 1\.0e-03, where the largest is"):
        expected.require_same(replace(expected, **{what: other}))
    with pytest.raises(Failed, match="other "):
        expected.require_same(replace(expected, **{what: type(own)()}))
