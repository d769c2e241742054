"""The model's own dropout within torch's layers, which Dynamo inlines, and within regions that are checkpointed."""

from __future__ import annotations

import functools
import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import graphreg
from graphreg import RegularizerError

X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))


class Attends(nn.Module):
    """Attention twice, a layer of a transformer twice, and a dropout."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.att = nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.3, batch_first=True)
        self.d = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.att(x, x, x)[0]
        h = self.att(h, x, x, need_weights=False)[0]
        out: Tensor = self.d(self.layer(self.layer(h)))
        return out


def compiled(model: nn.Module, **options: Any) -> tuple[Any, Any]:
    backend = graphreg.backend(inner="eager", **options)
    return torch.compile(model, backend=backend), backend


def output(result: Any) -> Tensor:
    value: Tensor = getattr(result, "output", result)
    return value


@functools.cache
def traced() -> graphreg.Traced:
    return graphreg.trace(Attends(), X)


@pytest.mark.parametrize("option", ["off", "seeded", {"att": 0.2, "layer.dropout1": "off"}])
def test_it_is_moved_as_in_a_trace(option: Any) -> None:
    """By the same names and with the same masks."""
    module = graphreg.rewrite(traced(), graphreg.plan(traced(), [], own_dropout=option), 3)
    run, backend = compiled(Attends(), own_dropout=option, rng=3)
    for _ in range(1 if isinstance(option, dict) else 2):
        torch.manual_seed(4)
        expected = output(module(X))
        torch.manual_seed(4)
        torch.testing.assert_close(run(X), expected)
    ours, theirs = graphreg.report(backend).own_dropout, graphreg.report(module).own_dropout
    assert {(row.site, row.becomes) for row in ours} == {(row.site, row.becomes) for row in theirs}


def test_sites_stay_what_they_are() -> None:
    """A value within a layer is no site, although its dropout has a name."""
    run, backend = compiled(Attends())
    run(X)
    assert [site.name for site in backend.traced().values] == ["x", "att", "att_1", "layer", "layer_1", "d"]


def test_the_only_dropout_is_in_a_layer() -> None:
    model = nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True)
    run, _ = compiled(model, own_dropout="off")
    plain = model.eval()(X, X, X)[0]
    model.train()
    torch.testing.assert_close(run(X, X, X)[0], plain)


class Checkpoints(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.d, self.e = nn.Linear(8, 8), nn.Dropout(0.5), nn.Dropout(0.5)

    def region(self, x: Tensor) -> Tensor:
        y: Tensor = self.d(self.a(x))
        return y

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.e(checkpoint(self.region, x, use_reentrant=False))
        return y


WHY = "cannot be moved: it draws random numbers by dropout, in code that the graph calls as one operation, such as a checkpoint"


def test_dropout_in_a_checkpoint_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(logging.getLogger("graphreg"), "warning", lambda text, *values: told.append(text % values))
    run, backend = compiled(Checkpoints(), own_dropout="off")
    run(X)
    rows = graphreg.report(backend).own_dropout
    assert [(row.site, row.becomes) for row in rows] == [("e", "off"), ("tag_activation_checkpoint", "kept")]
    assert [WHY in each for each in told] == [True]


def test_dropout_in_a_checkpoint_alone_is_refused() -> None:
    model = Checkpoints()
    model.e = nn.Identity()  # type: ignore[assignment]
    run, _ = compiled(model, own_dropout="off")
    with pytest.raises(RegularizerError, match=WHY):
        run(X)
