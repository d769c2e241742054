"""Attached penalties by the backend: which outputs lead to them, over several graphs, beside ``regularize`` on the same model in one."""

from __future__ import annotations

import gc
import re
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphreg
from graphreg import GraphRegError
from lacking import needs_result

# torch's own, where a graph's input is no leaf
pytestmark = [pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"), needs_result]
OPTIONS: dict[str, Any] = {
    "penalties": "attach", "scale": 2.0, "weight_l2": 1.0, "hidden_l1": {"weight": 1.0, "pattern": "relu*"},
}  # fmt: skip


class Returns(nn.Module):
    """``how`` says what is returned beside the product; with ``breaks`` its two halves are two graphs."""

    def __init__(self, how: Callable[[Any, Tensor, Tensor], Any], breaks: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.w = nn.Linear(4, 4), nn.Linear(4, 4), nn.Parameter(torch.full((4, 4), 2.0))
        self.how, self.breaks = how, breaks

    def forward(self, x: Tensor) -> Any:
        a = self.a(x).relu()
        if self.breaks:
            torch._dynamo.graph_break()
        return self.how(self, a, x)


class Halves(nn.Module):
    """Two products that do not depend on each other, in one graph or in two."""

    def __init__(self, breaks: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.breaks = nn.Linear(4, 4), nn.Linear(4, 4), breaks

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a = self.a(x).relu()
        if self.breaks:
            torch._dynamo.graph_break()
        return a, self.b(x).relu()


def x_of(grad: bool = True) -> Tensor:
    return torch.linspace(-1, 2, 12).view(3, 4).requires_grad_(grad)


def gradients(model: nn.Module, run: Any, part: Callable[[Any], Tensor]) -> dict[str, Tensor]:
    x = x_of()
    part(run(x)).square().sum().backward()
    found = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}
    return found | {"x": torch.zeros_like(x) if x.grad is None else x.grad}


def compiled(model: nn.Module, **more: Any) -> Any:
    return torch.compile(model, backend=graphreg.backend(inner="eager", **{**OPTIONS, **more}))


def by_regularize(model: nn.Module, part: Callable[[Any], Tensor]) -> dict[str, Tensor]:
    return gradients(model, graphreg.regularize(model, **OPTIONS), part)


def second(result: Any) -> Tensor:
    found: Tensor = result[1]
    return found


@pytest.mark.parametrize("how", [lambda m, a, x: (a.detach(), x.view_as(x)), lambda m, a, x: (a, m.w.t()), lambda m, a, x: (a, x[0])])
def test_a_view_of_what_is_given_leads_to_the_penalties(how: Any) -> None:
    model = Returns(how)
    torch.testing.assert_close(gradients(model, compiled(model), second), by_regularize(Returns(how), second))


@pytest.mark.parametrize(
    ("how", "what"),
    [
        (lambda m, a, x: (a.detach(), x), "a tensor that no graph computed, such as one of its arguments"),
        (lambda m, a, x: {"a": a.argmax(), "b": [m.w]}, "the parameter w itself"),
    ],
)
def test_what_alone_is_returned_as_it_is_is_refused(how: Any, what: str) -> None:
    sentence = (
        f"penalties='attach': the model returns {what}, and nothing else that needs a gradient. No backward pass would reach the "
        "penalties. Return a view of it (h.view_as(h)), which a graph makes; or use penalties='return' and add backend.penalties() to the "
        "loss, or graphreg.regularize."
    )
    run = compiled(Returns(how))
    for _ in range(2):
        with pytest.raises(GraphRegError, match=f"^{re.escape(sentence)}$"):
            run(x_of())
    with torch.no_grad():
        run(x_of())


def test_what_is_returned_as_it_is_beside_others_warns_once() -> None:
    model = Returns(lambda m, a, x: (a, m.w))
    run = compiled(model)
    sentence = (
        "penalties='attach': the model returns the parameter w itself, beside what its graphs compute. A backward pass from this "
        "tensor alone would not reach the penalties. Return a view of it"
    )
    with pytest.warns(UserWarning, match=f"^{re.escape(sentence)}") as told:
        run(x_of())
    assert len([each for each in told if str(each.message).startswith("penalties='attach'")]) == 1
    both: Callable[[Any], Tensor] = lambda result: result[0] + result[1][:3]  # noqa: E731
    torch.testing.assert_close(gradients(model, run, both), by_regularize(Returns(model.how), both))


@pytest.mark.parametrize("how", [lambda m, a, x: a.argmax(), lambda m, a, x: (a.detach(), x), lambda m, a, x: (a, x)])
def test_what_needs_no_gradient_is_returned_as_ever(how: Any) -> None:
    compiled(Returns(how))(x_of(False))


def test_what_code_outside_of_graphs_returns_is_refused_too() -> None:
    """The rest of the forward has no operation, so Dynamo leaves it to eager."""
    model = Returns(lambda m, a, x: m.w, breaks=True)
    with pytest.raises(GraphRegError, match="^penalties='attach': the model returns the parameter w itself, and nothing else"):
        compiled(model)(x_of())


@pytest.mark.parametrize("part", [second, sum])
def test_an_output_leads_to_what_earlier_graphs_measured(part: Any) -> None:
    """Also to what it does not depend on."""
    torch.testing.assert_close(gradients(model := Halves(True), compiled(model), part), by_regularize(Halves(False), part))


def test_a_backward_pass_that_misses_a_later_graph_is_refused() -> None:
    model = Halves(True)
    first, _ = compiled(model)(x_of())
    sentence = (
        "penalties='attach': this backward pass does not reach all graphs of the call, and would miss what hidden_l1 measured in the "
        "others. Have the loss depend on what the last graph computes, use penalties='return' and add backend.penalties() to the loss, "
        "or use graphreg.regularize."
    )
    with pytest.raises(GraphRegError, match=f"^{re.escape(sentence)}$"):
        first.sum().backward()


def test_each_backward_pass_counts_the_penalties_once() -> None:
    model, expected = Halves(True), by_regularize(Halves(False), second)
    result = compiled(model)(x_of())
    for times in (1, 2):
        second(result).square().sum().backward(retain_graph=True)
        torch.testing.assert_close(model.a.weight.grad, times * expected["a.weight"])


def test_a_call_leaves_nothing_behind() -> None:
    """The chain refers to the call, so the call must not refer to the chain when it has ended."""
    model = Halves(True)
    run = compiled(model)
    x = x_of()
    result = run(x)
    node = weakref.ref(result[1].grad_fn)
    del result
    run(x)
    gc.collect()
    assert node() is None


def test_an_optimizer_step_by_attached_penalties_is_that_of_returned_ones() -> None:
    attached, returned = Halves(True), Halves(True)
    run = compiled(attached)
    backend = graphreg.backend(inner="eager", **{name: value for name, value in OPTIONS.items() if name not in ("penalties", "scale")})
    other = torch.compile(returned, backend=backend)
    for _ in range(2):
        first, last = run(x_of())
        (first.sum() + last.sum()).backward()
        first, last = other(x_of())
        (first.sum() + last.sum() + 2.0 * sum(backend.penalties().values())).backward()
        for model in (attached, returned):
            torch.optim.SGD(model.parameters(), lr=0.1).step()
    torch.testing.assert_close(attached.state_dict(), returned.state_dict())
