"""Hooks that are a part of the model: timm's ``FeatureHookNet`` returns what its hooks have seen."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

timm = pytest.importorskip("timm")

import graphreg  # noqa: E402
from graphreg import GraphRegError  # noqa: E402

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def features() -> Any:
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", features_only=True, feature_cls="hook", out_indices=(1, 2)).train()
    model.body.layer3 = model.body.layer4 = nn.Identity()  # which nobody reads, and an export would take as long as the others
    return model


def test_feature_hooks() -> None:
    """In train mode the features are the model's, call after call, and those of rewritten values."""
    plain, model = features(), features()
    graphreg.regularize_(model, dropout={"body.layer1": 0.5}, weight_l2=0.1, penalties="attach", scale=1, rng=0)
    with graphreg.noise_off(model):
        for _ in range(2):
            assert all(torch.equal(ours, theirs) for ours, theirs in zip(model(X), plain(X), strict=True))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(model.eval()(X), plain.eval()(X), strict=True))
    assert 0.45 < float((model.train()(X)[0] == 0).float().mean()) < 0.6


class Recorder:
    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def note(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.seen.append(output)


class Recorded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.recorder = nn.Sequential(nn.Linear(3, 3), nn.ReLU()), nn.Linear(3, 2), Recorder()
        self.first.register_forward_hook(self.recorder.note)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.first(x))
        return y


def test_a_hook_that_the_forward_does_not_read_is_refused() -> None:
    """It waits for each call, and a graph makes none."""
    model = graphreg.regularize_(Recorded(), hidden_dropout=0.1, penalties="attach", scale=1)
    with pytest.raises(GraphRegError, match="first has a hook"):
        model(torch.randn(2, 3))
    assert model.recorder.seen == []  # type: ignore[union-attr]
