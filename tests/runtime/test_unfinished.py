"""A call that raises is not counted: in place or not, attached or not, with schedules and states, wherever it raised."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphreg
from graphreg import schedules

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu())


def made(way: str) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    model = Net()
    options: dict[str, Any] = {"hidden_dropout": 0.5, "spectral": 0.1, "hidden_l1": schedules.linear(0, 1, 10), "rng": 0}
    if way == "in place":
        graphreg.regularize_(model, scale=1, **options)
        return model, model
    more = {"penalties": "attach", "scale": 1} if way == "attached" else {}
    return model, graphreg.regularize(model, **options, **more)


def broken(*args: Any) -> None:
    raise ZeroDivisionError


def in_forward(model: nn.Module, module: nn.Module, x: Tensor) -> None:
    handle = model.get_submodule("b").register_forward_hook(broken)
    try:
        module(x)
    finally:
        handle.remove()


def behind_forward(model: nn.Module, module: nn.Module, x: Tensor) -> None:
    handle = module.register_forward_hook(broken)
    try:
        module(x)
    finally:
        handle.remove()


def by_shape(model: nn.Module, module: nn.Module, x: Tensor) -> None:
    module(x[:, :3])


def state_of(module: nn.Module) -> Any:
    state = graphreg.rng_state(module)
    tensors = [tensor.tolist() for site in state["state"]["spectral"].values() for tensor in site.values()]
    return state["call"], state["clock"], tensors


@pytest.mark.parametrize("way", ["returned", "attached", "in place"])
def test_a_call_that_raises_is_not_counted(way: str) -> None:
    model, module = made(way)
    _, undisturbed = made(way)
    module(X)
    undisturbed(X)
    for fails in (in_forward, behind_forward, by_shape):
        before, seen = state_of(module), module.penalties() if way != "returned" else None  # type: ignore[operator]
        for _ in range(3):
            with pytest.raises((ZeroDivisionError, RuntimeError)):
                fails(model, module, X)
            assert state_of(module) == before
        assert seen is None or module.penalties() == seen  # type: ignore[operator]
        for _ in range(3):
            found, expected = (out if isinstance(out := each(X), Tensor) else out[0] for each in (module, undisturbed))
            assert torch.equal(found, expected), fails
        assert state_of(module) == state_of(undisturbed)


def test_a_number_that_another_call_follows_stays_taken() -> None:
    """Here a call within the call; it might as well be one of another thread. Its number must not be drawn twice."""
    model, module = made("returned")
    seen: list[Tensor] = []

    def another(*args: Any) -> None:
        handle.remove()
        seen.append(module(X)[0])
        raise ZeroDivisionError

    handle = model.get_submodule("b").register_forward_hook(another)
    with pytest.raises(ZeroDivisionError):
        module(X)
    assert graphreg.rng_state(module)["call"] == 2
    assert not torch.equal(module(X)[0], seen[0])


def test_a_call_in_frozen_noise_that_raises() -> None:
    model, module = made("returned")
    with graphreg.frozen_noise(module), pytest.raises(ZeroDivisionError):
        in_forward(model, module, X)
    assert graphreg.rng_state(module)["call"] == 0
    with graphreg.frozen_noise(module):
        first = module(X)[0]
        with pytest.raises(ZeroDivisionError):
            in_forward(model, module, X)
        assert torch.equal(module(X)[0], first)
    assert graphreg.rng_state(module)["call"] == 1
