"""A model whose class derives from ``abc.ABC``, and one with a parameter that has no elements."""

from __future__ import annotations

import abc
import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

import graphreg

X = torch.randn(2, 3)


class Abstract(nn.Module, abc.ABC):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).relu())  # type: ignore[no-any-return]


def test_it_is_copied_and_pickled() -> None:
    module = graphreg.regularize(Abstract(), example_inputs=X, rng=0, hidden_dropout=0.1, verify=True)
    expected = module(X)[0]
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        graphreg.set_rng_state(twin, graphreg.rng_state(module))
        graphreg.set_rng_state(module, graphreg.rng_state(twin))
        assert torch.equal(twin(X)[0], module(X)[0])
    assert expected.shape == (2, 2)


def test_a_parameter_without_elements() -> None:
    model = Abstract()
    model.none = nn.Parameter(torch.empty(0, 4))
    plain = graphreg.regularize(Abstract(), weight_l2=1e-3)
    module = graphreg.regularize(model, weight_l2=1e-3)
    module.load_state_dict({**plain.state_dict(), "none": model.none})
    assert torch.equal(module(X)[1]["weight_l2"], plain(X)[1]["weight_l2"])
    with pytest.raises(graphreg.NoMatchError, match="without elements"):
        graphreg.regularize(model, weight_l2={"none": 1e-3})
