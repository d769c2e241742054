"""``named_parameters``: what a selector selects, of any model."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from graphreg import NoMatchError, named_parameters


def test_by_selector() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.BatchNorm1d(3), nn.Linear(3, 2))
    model[3].weight.requires_grad_(False)
    own = dict(model.named_parameters())
    assert [(name, id(p)) for name, p in named_parameters(model, "*").items()] == [(name, id(p)) for name, p in own.items()]
    assert list(named_parameters(model, "*.weight@Linear")) == ["0.weight", "3.weight"]
    assert list(named_parameters(model, ("3.*", "0.*", "!*.bias"))) == ["0.weight", "3.weight"]
    assert list(named_parameters(model, lambda site: site.shape == (3,))) == ["0.bias", "2.weight", "2.bias"]
    assert named_parameters(torch.compile(model, backend="eager"), "3.weight")["3.weight"] is model[3].weight
    with pytest.raises(NoMatchError, match=r"'3.wieght' matches no parameter of Sequential. Near names: 3.weight, 2.weight"):
        named_parameters(model, ["0.*", "3.wieght"])


def test_what_no_regularizer_could_act_on() -> None:
    """Of lazy and quantized layers, and without elements."""
    model = nn.Sequential(nn.LazyLinear(2), nn.Linear(2, 2))
    model[1].register_parameter("codes", nn.Parameter(torch.ones(2, dtype=torch.int8), requires_grad=False))
    model[1].register_parameter("none", nn.Parameter(torch.empty(0)))
    assert list(named_parameters(model, ("0.*", "*.codes", "*.none"))) == ["0.weight", "0.bias", "1.codes", "1.none"]


def test_a_shared_module_has_its_first_name() -> None:
    layer = nn.Linear(2, 2)
    model = nn.ModuleDict({"a": layer, "b": layer})
    assert list(named_parameters(model, "b.*")) == ["a.weight", "a.bias"]
