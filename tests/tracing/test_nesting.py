"""Modules within modules: however deep, each is seen into, and what Python cannot nest is said."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import graphreg
from graphreg.errors import TraceError
from graphreg.tracing.trace import FrontEnd

X = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))


class Holder(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def nested(depth: int, by: str) -> tuple[nn.Module, nn.Module]:
    """What is in the middle, and all of it."""
    torch.manual_seed(0)
    middle: nn.Module = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model = middle
    for _ in range(depth - 1):
        model = nn.Sequential(model) if by == "numbers" else Holder(model)
    return middle, model


@pytest.fixture(autouse=True)
def limit() -> Iterator[None]:
    before = sys.getrecursionlimit()
    yield
    assert sys.getrecursionlimit() == before


@pytest.mark.parametrize("front_end", ["symbolic", "export"])
@pytest.mark.parametrize("by", ["numbers", "names"])
@pytest.mark.parametrize("depth", [120, 300])
def test_each_is_seen_into(depth: int, by: str, front_end: FrontEnd) -> None:
    middle, model = nested(depth, by)
    traced = graphreg.trace(model, X, front_end)
    assert not traced.opaque_modules and [site.name.count(".") for site in traced.values if site.role == "hidden"] == [depth - 1]
    module = graphreg.rewrite(traced, graphreg.plan(traced, graphreg.from_kwargs(traced, hidden_noise=0.0, hidden_l1=0.1)), rng=0)
    output, penalties = module(X)
    hidden = middle[:2](X)  # type: ignore[index]
    assert torch.equal(output, middle(X))
    torch.testing.assert_close(penalties["hidden_l1"], 0.1 * hidden.abs().mean())
    output.sum().backward()
    found = [p.grad for p in model.parameters()]
    for p in model.parameters():
        p.grad = None
    middle(X).sum().backward()
    assert all(torch.equal(a, p.grad) for a, p in zip(found, model.parameters(), strict=True) if a is not None and p.grad is not None)
    assert torch.equal(graphreg.strip(module)(X), middle(X))


def test_what_such_a_module_costs_is_known() -> None:
    module = graphreg.regularize(nested(150, "names")[1], hidden_dropout=0.1, example_inputs=X)
    assert "not known" not in str(graphreg.report(module))


def test_a_limit_that_is_reached_all_the_same_is_said() -> None:
    class Endless(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def deeper(self, x: Tensor) -> Tensor:
            return self.deeper(self.fc(x))

        def forward(self, x: Tensor) -> Tensor:
            return self.deeper(x)

    with pytest.raises(TraceError, match=r"Python's recursion limit was reached.*sys\.setrecursionlimit"):
        graphreg.trace(nn.Sequential(nn.Linear(4, 4), Endless()), front_end="symbolic")


@pytest.mark.parametrize("depth", [1, 60])
def test_the_emitted_code_of_shallow_models_is_torch_fxs(depth: int) -> None:
    module = graphreg.strip(graphreg.regularize(nested(depth, "names")[1], weight_l2=0.1))
    assert ("get_submodule" in module.code) == (depth > 50)


NAMES = ["class", "a-b", "0", 'a"b', "a'b", "a\\b", "ﬁ", "None", "key", "torch", "é", "_lambda", "lambda"]


class Oddly(nn.Module):
    """Layers and parameters with names that Python's grammar does not have."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleDict({name: nn.Linear(4, 4) for name in NAMES})
        for name in NAMES:
            self.register_parameter(name, nn.Parameter(torch.randn(4)))
            self.layers[name].register_buffer(f"{name}-", torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        for name, layer in self.layers.items():
            x = torch.relu(layer(x)) * getattr(self, name) + getattr(layer, f"{name}-")
        return x


def test_odd_names() -> None:
    model = Oddly()
    module = graphreg.regularize(model, hidden_noise=0.0, weight_l2=0.1)
    assert list(module.state_dict()) == list(model.state_dict())
    compiled = graphreg.regularize(model, hidden_noise=0.0, weight_l2=0.1, compile={"backend": "eager", "fullgraph": True})
    found = []
    for run in (lambda x: module(x)[0], lambda x: compiled(x)[0], graphreg.strip(module), model):
        model.zero_grad()
        y = run(X)
        y.sum().backward()
        found.append([y, *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    assert all(torch.equal(a, b) for one in found for a, b in zip(one, found[-1], strict=True))
    assert "getattr(self.layers, 'class')" in module.code


def test_arguments_that_the_emitted_code_has_other_things_for() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.out = nn.Linear(4, 4), nn.Linear(4, 4)

    class Fine(Net):
        def forward(self, key: Tensor, input: Tensor, *, len: Tensor) -> Tensor:
            return self.out(torch.relu(self.fc(key)) + input * len)

    class Hidden(Net):
        def forward(self, torch: Tensor) -> Tensor:
            return self.out(nn.functional.relu(self.fc(torch)).flatten(1) + globals()["torch"].ones(4))

    class Owner(Net):
        def forward(me, self: Tensor) -> Tensor:
            return me.out(torch.relu(me.fc(self)))

    model = Fine()
    assert torch.equal(graphreg.regularize(model, hidden_noise=0.0)(X, input=X, len=X)[0], model(X, input=X, len=X))
    for kind, name in ((Hidden, "torch"), (Owner, "self")):
        with pytest.raises(TraceError, match=f"takes an argument '{name}'.*Rename the argument"):
            graphreg.regularize(kind(), hidden_noise=0.0)
