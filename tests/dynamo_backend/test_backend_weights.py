"""Penalties on parameters through the backend: in the call's first graph, whole, and once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import graphreg
from lacking import needs_result


class Net(nn.Module):
    """Two layers, a break between them where it is asked for, and one that no forward reads."""

    def __init__(self, breaks: bool = False) -> None:
        super().__init__()
        self.a, self.b, self.idle, self.breaks = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(5, 5), breaks

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.a(x))
        if self.breaks:
            torch._dynamo.graph_break()
        return self.b(h)


class Graphs:
    """An inner backend that keeps the graphs which it is given."""

    def __init__(self) -> None:
        self.seen: list[fx.Graph] = []

    def __call__(self, gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        self.seen.append(gm.graph)
        return gm.forward

    def totals(self) -> list[list[str]]:
        return [[str(n.target) for n in graph.nodes if "total" in str(n.target)] for graph in self.seen]


def by_hand(model: Net, weight: float = 0.5) -> Tensor:
    return weight * torch.stack([layer.weight.square().mean() for layer in (model.a, model.b, model.idle)]).mean()


def gradients(model: nn.Module, loss: Tensor) -> list[Tensor | None]:
    model.zero_grad()
    loss.backward()
    return [p.grad for p in model.parameters()]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo's own, behind a break
@pytest.mark.parametrize("breaks", [False, True])
@pytest.mark.parametrize("penalties", ["return", pytest.param("attach", marks=needs_result)])
def test_in_the_first_graph_and_once(breaks: bool, penalties: Any) -> None:
    torch.manual_seed(0)
    model, inner, x = Net(breaks), Graphs(), torch.randn(2, 3)
    backend = graphreg.backend(inner=inner, penalties=penalties, scale=1 if penalties == "attach" else None, weight_l2=0.5)
    run = torch.compile(model, backend=backend)
    for _ in range(2):
        loss = run(x).square().mean()
        torch.testing.assert_close(backend.penalties()["weight_l2"], by_hand(model), check_stride=False)
        found = gradients(model, loss + (backend.penalties()["weight_l2"] if penalties == "return" else 0))
        torch.testing.assert_close(found, gradients(model, model(x).square().mean() + by_hand(model)))
    assert inner.totals() == [["graphreg_total_weight_l2"], []][: 1 + breaks]


def test_a_graph_as_it_is_compiled() -> None:
    inner = Graphs()
    run = torch.compile(Net(), backend=graphreg.backend(inner=inner, weight_l2=0.5))
    run(torch.randn(2, 3))
    (total,) = [n for n in inner.seen[0].nodes if str(n.target) == "graphreg_total_weight_l2"]
    assert [str(arg) for arg in total.args] == [
        "graphreg_strength_weight_l2", "l_self_modules_a_parameters_weight_", "l_self_modules_b_parameters_weight_", "graphreg_parameter_0",
    ]  # fmt: skip
    assert inner.seen[0].output_node().args[0][-1] is total  # type: ignore[index]


class Largest(graphreg.Penalty, keys=("largest_weight",), on="parameters"):
    """The largest weight of all."""

    def __call__(self, values: dict[str, Tensor]) -> Tensor:
        return torch.stack([w.abs().max() for w in values.values()]).max()


def test_a_penalty_that_looks_at_all_parameters() -> None:
    model, inner = Net(), Graphs()
    backend = graphreg.backend(Largest("*.weight", 2.0), inner=inner)
    torch.compile(model, backend=backend)(torch.randn(2, 3))
    (value,) = backend.penalties().values()
    torch.testing.assert_close(value, 2 * max(layer.weight.abs().max() for layer in (model.a, model.b, model.idle)))
    assert inner.totals() == [["graphreg_total_largest_weight"]]


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_a_parameter_that_the_graph_does_not_read_is_frozen_and_thawed(inner: str) -> None:
    torch.manual_seed(0)
    model, x = Net(), torch.randn(2, 3)
    model.idle.requires_grad_(False)
    backend = graphreg.backend(inner=inner, weight_l2=0.5)
    run = torch.compile(model, backend=backend)
    for trains in (False, True, False):
        model.idle.requires_grad_(trains)
        loss = run(x).square().mean()
        torch.testing.assert_close(backend.penalties()["weight_l2"], by_hand(model))
        found = gradients(model, loss + backend.penalties()["weight_l2"])
        torch.testing.assert_close(found, gradients(model, model(x).square().mean() + by_hand(model)))
        assert (model.idle.weight.grad is not None) == trains
    model.idle.weight.data = model.idle.weight.data.double()  # and of another dtype: measured behind the call, as such
    run(x)
    assert backend.penalties()["weight_l2"].dtype == torch.float64


def test_a_strength_that_changes_and_no_gradients() -> None:
    model, x = Net(), torch.randn(2, 3)
    backend = graphreg.backend(inner="eager", weight_l2=0.5)
    run = torch.compile(model, backend=backend)
    run(x)
    graphreg.set_strength(backend, "weight_l2", 3.0)
    run(x)
    torch.testing.assert_close(backend.penalties()["weight_l2"], by_hand(model, 3.0))
    with torch.no_grad():
        run(x)
    assert not backend.penalties()["weight_l2"].requires_grad


def test_a_splice_behind_a_relu_is_recomputed_in_backward() -> None:
    """Kept for backward: the ReLU's value and a mask of one byte an element; not what the next layer reads, nor a bool."""
    model, x = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)), torch.randn(32, 64)
    backend = graphreg.backend(inner="aot_eager_decomp_partition", rng=0, hidden_dropout=0.5)
    graphreg.regularize(model, hidden_dropout=0.5)  # a formula is tried once a process, and would save tensors of this shape, too
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        torch.compile(model, backend=backend)(x)
    assert sorted(str(t.dtype) for t in kept if t.shape == (32, 64)) == ["torch.float32", "torch.float32", "torch.int8"]  # x too
