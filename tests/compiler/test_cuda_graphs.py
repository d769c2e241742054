"""The form that compiled code has for CUDA graphs, tested without a GPU: with it, values and gradients are those of eager."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch._functorch.config as functorch
from torch import Tensor, nn

import graphreg
from graphreg.rng import operators

X = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
# all that one call leaves to the next: keys, scheduled strengths, a state
REGULARIZERS: dict[str, Any] = {
    "hidden_dropout": 0.4, "hidden_l1": graphreg.schedules.linear(0.0, 0.5, 4), "spectral": 0.1,
}  # fmt: skip


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16), nn.Sigmoid(), nn.Linear(16, 2))


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a CPU had CUDA graphs. Inductor leaves them out on a CPU, but not the form of the graph."""
    monkeypatch.setattr(operators, "RECORDED_ON", ("cpu",))


def steps(module: Any, compiled: Any, count: int = 4) -> list[Tensor]:
    """What some steps of training compute: outputs, penalties, gradients."""
    found = list[Tensor]()
    for i in range(count):
        module.zero_grad()
        output, penalties = compiled(X + i)
        total = sum(penalties.values(), output.sum())
        total.backward()
        found += [output.detach(), total.detach(), *(p.grad.clone() for p in module.parameters())]
    return found


@pytest.mark.parametrize("settings", [{}, {"activation_memory_budget": 0.0}])
def test_values_and_gradients_are_eagers(settings: dict[str, Any], recorded: None) -> None:
    module = graphreg.regularize(net(), **REGULARIZERS, rng=0)
    other = copy.deepcopy(module)
    with functorch.patch(**settings):
        compiled = torch.compile(other, mode="reduce-overhead", fullgraph=True)
        for expected, got in zip(steps(module, module), steps(other, compiled), strict=True):
            torch.testing.assert_close(got, expected)


class Captured:
    """A backend that keeps the operators of the graphs that it gets, and runs the graphs in eager."""

    def __init__(self) -> None:
        self.targets = list[str]()

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.targets += [str(node.target) for node in graph.graph.nodes]
        return graph


@pytest.mark.parametrize(("mode", "copies"), [("reduce-overhead", 4), ("default", 0)])
def test_only_where_cuda_graphs_are_asked_for(mode: str, copies: int, recorded: None, monkeypatch: pytest.MonkeyPatch) -> None:
    captured = Captured()
    monkeypatch.setattr(torch._TorchCompileInductorWrapper, "__call__", lambda self, *args: captured(*args))
    module = graphreg.regularize(net(), hidden_dropout=0.4, rng=0)
    torch.compile(module, mode=mode, fullgraph=True)(X)
    assert sum("unrecorded" in target for target in captured.targets) == copies  # the number and the keys, taken and left


def test_a_cpu_has_no_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    captured = Captured()
    monkeypatch.setattr(torch._TorchCompileInductorWrapper, "__call__", lambda self, *args: captured(*args))
    torch.compile(graphreg.regularize(net(), hidden_dropout=0.4, rng=0), mode="reduce-overhead", fullgraph=True)(X)
    assert captured.targets and not any("unrecorded" in target for target in captured.targets)
