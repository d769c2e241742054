"""Penalties on sequences under torch.compile(fullgraph=True): eager's values and gradients, and no compilation too many."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor, nn

import graphreg
from graphreg.passes import RecurrentNorm, RecurrentState

X = torch.randn(4, 3, 3, generator=torch.Generator().manual_seed(1))
LENGTHS = torch.tensor([3, 1, 3, 2])
MASK = torch.arange(3) < LENGTHS[:, None]


class Loop(nn.Module):
    """A cell called three times, classified by its last state."""

    def __init__(self, cell: Any = nn.GRUCell) -> None:
        super().__init__()
        self.cell, self.head = cell(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        h = x.new_zeros(x.shape[0], 4)
        for t in range(3):
            h = self.cell(x[:, t], h)
        return self.head(h)


class Own(nn.Module):
    def __init__(self, inputs: int, units: int) -> None:
        super().__init__()
        self.into, self.back = nn.Linear(inputs, units), nn.Linear(units, units)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return torch.tanh(self.into(x) + self.back(h))


class Block(nn.Module):
    """A transformer's: attention and an MLP, on [batch, time, units]."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.qkv, self.norm = nn.Linear(3, 8), nn.Linear(8, 24), nn.LayerNorm(8)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        h = self.embed(x)
        q, k, v = self.qkv(self.norm(h)).chunk(3, -1)
        h = h + nn.functional.scaled_dot_product_attention(q, k, v)
        return h + self.mlp(self.norm(h))


class Embedded(nn.Module):
    """A layer on [batch, time, units] whose output is classified."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embed(x)))


def penalties(site: str, **options: Any) -> list[graphreg.Penalty]:
    return [
        RecurrentState(site, 0.3, **options), RecurrentNorm(site, 0.2, **options),
        RecurrentNorm(site, 0.1, norm="l2", name="stabilizer", **options),
    ]  # fmt: skip


def step(module: nn.Module, *args: Tensor) -> list[Tensor]:
    """The output, the penalties and the gradient of each parameter."""
    module.zero_grad()
    output, penalties = module(*args)
    (output.square().mean() + sum(penalties.values())).backward()
    return [output.detach(), *(value.detach() for value in penalties.values()), *(p.grad.clone() for p in module.parameters())]


MODELS: dict[str, Any] = {
    "GRUCell": (lambda: Loop(nn.GRUCell), "cell"),
    "own cell": (lambda: Loop(Own), "cell"),
    "transformer block": (Block, "add"),
}
GIVEN = {"all steps": None, "lengths": LENGTHS, "mask": MASK}
SAMPLE = [("GRUCell", "lengths"), ("own cell", "mask"), ("own cell", "all steps"), ("transformer block", "mask")]


def equals_eager(name: str, steps: str, mode: bool, backend: str, **more: Any) -> None:
    (make, site), lengths = MODELS[name], GIVEN[steps]
    module = graphreg.regularize(make(), penalties(site, **({} if lengths is None else {"lengths": "lengths"})), rng=0, **more).train(mode)
    args = X, LENGTHS if lengths is None else lengths
    eager = step(module, *args)
    if more:
        graphreg.set_rng_state(module, {**graphreg.rng_state(module), "call": 0})
    torch.testing.assert_close(step(torch.compile(module, fullgraph=True, backend=backend), *args), eager, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "steps"), SAMPLE)
def test_equals_eager(name: str, steps: str) -> None:
    equals_eager(name, steps, True, "aot_eager")


def test_equals_eager_in_eval_mode() -> None:
    equals_eager("own cell", "all steps", False, "aot_eager")


def test_equals_eager_behind_a_splice() -> None:
    equals_eager("GRUCell", "lengths", True, "aot_eager", dropout={"cell": 0.3})


def test_equals_eager_under_inductor() -> None:
    equals_eager("own cell", "lengths", True, "inductor")


@pytest.mark.sweep
@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("steps", GIVEN)
@pytest.mark.parametrize("name", MODELS)
def test_equals_eager_under_inductor_everywhere(name: str, steps: str, mode: bool) -> None:
    equals_eager(name, steps, mode, "inductor")


def test_gradients_are_finite_at_a_zero_state_when_compiled() -> None:
    model = Embedded()
    nn.init.zeros_(model.embed.weight), nn.init.zeros_(model.embed.bias)
    module = graphreg.regularize(model, penalties("embed"))
    assert all(torch.isfinite(value).all() for value in step(torch.compile(module, fullgraph=True, backend="aot_eager"), X, LENGTHS))


def test_other_sizes_and_strengths_do_not_recompile() -> None:
    """After the second size of batch and time; the numbers are those of eager at each."""
    module = graphreg.regularize(Block(), penalties("add", lengths="lengths"))
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    for i, (batch, time) in enumerate([(4, 5), (3, 7), (6, 9)]):
        x, lengths = torch.randn(batch, time, 3), torch.randint(1, time + 1, (batch,))
        graphreg.set_strength(module, "recurrent_state", 0.1 * (i + 1))
        torch.testing.assert_close(step(compiled, x, lengths), step(module, x, lengths), rtol=1e-5, atol=1e-6)
    assert counter.frame_count == 2


def test_lengths_out_of_range_are_refused_when_compiled() -> None:
    """The shape is looked at while it compiles, the numbers when it runs; both sentences are ours."""
    module = graphreg.regularize(Embedded(), RecurrentState("embed", 1.0, lengths="lengths"))
    module.compile(fullgraph=True, backend="aot_eager")
    module(X, LENGTHS)
    message = "RecurrentState at embed: lengths='lengths' must be between 0 and the number of steps"
    with pytest.raises(RuntimeError, match=message):
        module(X, LENGTHS + 1)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="it must be whole numbers of shape"):
        module(X, LENGTHS[:, None])
