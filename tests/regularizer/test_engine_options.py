"""The options that the engine reads of a regularizer: its own fields, or what somebody's class has by these names."""

from __future__ import annotations

from dataclasses import KW_ONLY
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphreg
from graphreg import Penalty, RegularizerError
from graphreg.regularizer.engine_options import EngineOptions


class Plain(Penalty, on="parameters"):
    def __call__(self, w: Tensor) -> Tensor:
        return w.abs().mean()


class Field(Plain, on="parameters"):
    reduction: str = "sum"


class Attribute(Plain, on="parameters"):
    reduction = "sum"


class Property(Plain, on="parameters"):
    @property
    def reduction(self) -> str:
        return "sum"


class Needed(Penalty):
    _: KW_ONLY
    lengths: str

    def __call__(self, steps: Tensor, lengths: Tensor) -> Tensor:
        return steps.abs().mean()


def test_a_class_without_them_has_the_defaults() -> None:
    assert Plain("*", 0.1).engine_options == EngineOptions() == EngineOptions("mean", 1, None, "*", False)


@pytest.mark.parametrize(("cls", "factor"), [(Plain, 1), (Field, 2), (Attribute, 2), (Property, 2)])
def test_a_sum_over_two_parameters_is_twice_their_mean(cls: Any, factor: int) -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    mean = torch.stack([w.abs().mean() for w in model.parameters()]).mean()
    module = graphreg.regularize(model, cls("*", 1.0, name="size"))
    torch.testing.assert_close(module(torch.ones(1, 2)).penalties["size"], factor * mean)


def test_an_option_without_a_default_stays_required() -> None:
    assert Needed("rnn", 0.1, lengths="n").engine_options.lengths == "n"
    with pytest.raises(TypeError, match="lengths"):
        Needed("rnn", 0.1)  # type: ignore[call-arg]


def test_a_weight_that_was_not_given_is_no_number() -> None:
    with pytest.raises(RegularizerError, match="weight was not given"):
        Plain("*")
    with pytest.raises(RegularizerError, match="weight is nan"):
        Plain("*", float("nan"))
