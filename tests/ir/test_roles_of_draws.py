"""What is computed from random numbers that the forward draws is computed from data: noise of a generator, steps of a diffusion model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphreg

Start = Callable[[Any, Tensor], Tensor]
STARTS: dict[str, Start] = {
    "randn": lambda model, x: torch.randn(x.shape[0], 4),
    "randint": lambda model, x: torch.randint(0, 10, (x.shape[0],), device=x.device)[:, None].float().expand(-1, 4),
    "like": lambda model, x: torch.rand_like(x),
    "in place": lambda model, x: torch.empty(x.shape[0], 4).normal_(),
    "permutation": lambda model, x: torch.randperm(x.shape[1])[None].float(),
}
CONSTANTS: dict[str, Start] = {
    "ones": lambda model, x: torch.ones(len(x), 4),
    "a parameter": lambda model, x: model.start,
    "dropout of a parameter": lambda model, x: nn.functional.dropout(model.start),
    "dropout of a constant": lambda model, x: nn.functional.dropout(torch.ones(len(x), 4)),
}


class Generator(nn.Module):
    def __init__(self, start: Start) -> None:
        super().__init__()
        self.start, self.begin = nn.Parameter(torch.ones(1, 4)), start
        self.up, self.down, self.judge = nn.Linear(4, 8), nn.Linear(8, 4), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        made = self.down(self.up(self.begin(self, x)).relu())
        return self.judge(x * 0 + made)


def hidden(start: Start, inputs: Any) -> list[str]:
    traced = graphreg.trace(Generator(start), example_inputs=inputs)
    return [site.name for site in traced.values if site.role == "hidden"]


@pytest.mark.parametrize("inputs", [None, torch.ones(3, 4)], ids=["bare", "inputs"])
@pytest.mark.parametrize("start", STARTS.values(), ids=STARTS)
def test_a_draw_is_data(start: Start, inputs: Any) -> None:
    assert "relu" in hidden(start, inputs)


@pytest.mark.parametrize("start", CONSTANTS.values(), ids=CONSTANTS)
def test_a_constant_is_none(start: Start) -> None:
    assert "relu" not in hidden(start, torch.ones(3, 4))


@pytest.mark.parametrize("new", [True, False])
def test_an_initial_state_is_a_constant(new: bool) -> None:
    """Also if it has the dtype and device of a value, and so reads it."""

    class Cell(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.inner, self.state, self.out = nn.Embedding(9, 4), nn.Linear(4, 3), nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            e = self.table(x)
            h = e.new_zeros(len(x), 3) if new else torch.zeros(len(x), 3)
            for t in range(2):
                h = torch.tanh(self.inner(e[:, t]) + self.state(h))
            y: Tensor = self.out(h)
            return y

    module = graphreg.regularize(Cell(), hidden_l2=1.0, example_inputs=torch.ones(3, 2, dtype=torch.long))
    assert graphreg.report(module).regularizers[0].sites == ("table", "tanh", "tanh_1")


@torch.fx.wrap
def mixed_like(x: Tensor) -> Tensor:
    return x.flip(-1)


class Mixes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.out(mixed_like(self.inner(x)))
        return y


def test_a_users_function_is_no_constant_by_its_name() -> None:
    sites = graphreg.report(graphreg.regularize(Mixes(), hidden_l2=1.0)).regularizers[0].sites
    assert sites == ("mixed_like",)


@pytest.mark.parametrize("normalize", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm])
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
def test_the_directions_of_one_input_channel_are_weights(normalize: Callable[..., nn.Module]) -> None:
    """They have the shape of the lengths, [16, 1, 1]."""
    model = nn.Sequential(normalize(nn.Conv1d(1, 16, 1)), nn.Conv1d(16, 2, 1))
    sites = graphreg.report(graphreg.regularize(model, weight_l2=0.1)).regularizers[0].sites
    assert sites in (("0.weight_v", "1.weight"), ("0.parametrizations.weight.original1", "1.weight"))
