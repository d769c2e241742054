"""A forward that reads no mode is traced once; any way to read one has both modes traced."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import graphreg
from own_modes import assert_both_modes_are_the_models

X = torch.randn(3, 4)


class Leaves(nn.Module):
    """Layers of torch know their own modes, and are not traced."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.drop = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.norm(self.a(x)).relu())


class Reads(Leaves):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (2 if self.training else 3)


class ReadsByName(Leaves):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (2 if getattr(self, "training") else 3)  # noqa: B009


class ReadsItsDict(Leaves):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (2 if vars(self)["training"] else 3)


class ReadsAll(Leaves):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (2 if dict(self.__dict__.items())["training"] else 3)


class ReadsAnothers(Leaves):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (2 if self.norm.training else 3)


class OwnDropout(nn.Dropout):
    """Its forward is torch's, and is traced, since the class is not."""


class Inherits(Leaves):
    def __init__(self) -> None:
        super().__init__()
        self.drop = OwnDropout(0.5)


class Functional(Leaves):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.a(x), 0.5, self.training)


class Property(Leaves):
    """The class has a mode of its own in the place of torch's attribute."""

    @property
    def training(self) -> bool:
        return bool(self.__dict__.get("mode", True))

    @training.setter
    def training(self, mode: bool) -> None:
        self.__dict__["mode"] = mode

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (2 if self.training else 3)


def traces(monkeypatch: pytest.MonkeyPatch, model: nn.Module, **options: Any) -> int:
    count, trace = [0], fx.Tracer.trace

    def counted(*args: Any, **keywords: Any) -> Any:
        count[0] += 1
        return trace(*args, **keywords)

    monkeypatch.setattr(fx.Tracer, "trace", counted)
    graphreg.trace(model, **options)
    return count[0]


def test_a_forward_that_reads_no_mode_is_traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    assert traces(monkeypatch, Leaves()) == 1
    monkeypatch.undo()
    assert traces(monkeypatch, nn.Sequential(Leaves(), nn.Sequential(nn.Linear(4, 2)))) == 1


WAYS = [Reads, ReadsByName, ReadsItsDict, ReadsAll, ReadsAnothers, Inherits, Functional, Property]


@pytest.mark.parametrize("make", WAYS)
def test_each_way_to_read_one_is_followed(monkeypatch: pytest.MonkeyPatch, make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = make()
    assert traces(monkeypatch, model) >= 2
    assert_both_modes_are_the_models(model, X)


class TwoGraphs(Leaves):
    """Reads the mode of a part, and branches on it, so each mode has a graph of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.drop.training else self.a(x)


@pytest.mark.parametrize("training", [True, False])
def test_sizes_of_two_graphs_are_found_in_either_mode(monkeypatch: pytest.MonkeyPatch, training: bool) -> None:
    """Where fake tensors find nothing, graphs run on a copy: in a mode that fits what they assert."""
    monkeypatch.setattr("graphreg.tracing.fake_inputs._propagate_on_fakes", lambda *_: False)
    monkeypatch.setattr("graphreg.tracing.symbolic.tracer.SiteTracer.all_values", lambda *_: None)
    traced = graphreg.trace(TwoGraphs().train(training), X, "symbolic", prove=False)
    assert traced.graphs.keys() == {"train", "eval"}
    assert {site.name: site.shape for site in traced.sites}["a"] == (3, 4)
