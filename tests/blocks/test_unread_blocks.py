"""Hooks of blocks and of all modules: what they get, and where they are refused because they would not run."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphreg
from graphreg.errors import GraphRegError, TraceError

X = torch.ones(2, 4)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).relu()


class Net(nn.Module):
    """The result of its second block is read by its hooks alone, as in feature extraction."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Block(), Block()

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        self.second(y)
        return y.tanh()


@pytest.mark.parametrize("in_place", [False, True])
def test_hooks_of_a_block_whose_result_nobody_reads_get_the_result(in_place: bool) -> None:
    model, seen = Net(), list[Tensor]()
    regularize: Callable[..., Any] = graphreg.regularize_ if in_place else graphreg.regularize
    module = regularize(model, hidden_dropout=0.0, blocks=["first", "second"], rng=0)
    for path in ("first", "second"):
        module.get_submodule(path).register_forward_hook(lambda block, args, output: seen.append(output))
    module(X)
    assert len(seen) == 2 and torch.equal(seen[1], model.second.layer(seen[0]).relu())


class Parts:
    """What a block returns, of a class that torch's pytree does not take apart."""

    def __init__(self, *parts: Tensor) -> None:
        self.parts = parts


class Halving(nn.Module):
    """A block that also writes, so that its code stays where nobody reads its results."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(4))
        self.norm = nn.LayerNorm(4)

    def forward(self, x: Tensor, y: Tensor) -> Parts:
        self.scale.mul_(0.5)
        moved = y + self.scale
        return Parts(self.norm(moved), moved)


class Unread(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.block = nn.Linear(4, 4), Halving()

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x).tanh()
        normed, moved = self.block(h, x).parts
        self.block(moved, normed)
        return self.layer(h)


def test_a_call_of_a_block_gets_what_only_another_call_has() -> None:
    """What the second call gets, its hooks would see; its code does not read it, and the class of the first call's output hides it."""
    model = Unread()
    module = graphreg.regularize(copy.deepcopy(model), hidden_l2=0.0, blocks="block", rng=0)
    assert torch.equal(module(X).output, model(X))
    assert torch.equal(module.block.scale, torch.full((4,), 0.25))


@pytest.fixture
def hooked() -> Iterator[Callable[[], list[str]]]:
    """A function that registers a hook for all modules, and returns the list of the classes at which it runs."""
    handles: list[Any] = []

    def register() -> list[str]:
        seen: list[str] = []
        handles.append(nn.modules.module.register_module_forward_hook(lambda module, args, output: seen.append(type(module).__name__)))
        return seen

    yield register
    for handle in handles:
        handle.remove()


def test_a_hook_of_all_modules_is_refused_where_it_would_not_run(hooked: Callable[[], list[str]]) -> None:
    model = graphreg.regularize_(Net(), hidden_dropout=0.1, rng=0, example_inputs=X)
    seen = hooked()
    with pytest.raises(GraphRegError, match="does not call first"):
        model(X)
    model.eval()(X)
    assert seen == ["Linear", "Block", "Linear", "Block", "Net"]


def test_a_hook_of_all_modules_runs_on_what_a_graph_calls(hooked: Callable[[], list[str]]) -> None:
    module = graphreg.regularize(Net(), weight_l2=0.1)
    flat = graphreg.regularize_(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), weight_l2=0.1, scale=1, example_inputs=X)
    seen = hooked()
    module(X)
    assert seen[-1] == "Net" and seen.count("Linear") == 2 and "Block" not in seen
    flat(X)
    assert seen[-1] == "Sequential"


def test_no_trace_under_a_hook_of_all_modules(hooked: Callable[[], list[str]]) -> None:
    """The graph would contain what the hook does, and run the hook as well."""
    model = graphreg.regularize_(Net(), hidden_dropout=0.1, rng=0)
    seen = hooked()
    with pytest.raises(TraceError, match="for all modules"):
        model(X)
    with pytest.raises(TraceError, match="for all modules"):
        graphreg.regularize(Net(), weight_l2=0.1)
    assert seen == []
