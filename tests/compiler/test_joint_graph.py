"""What Inductor is made to make of second derivatives: the same values, in a graph that is worked out here by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._decomp import get_decompositions
from torch._functorch import config as functorch_config
from torch._inductor import config as inductor_config
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import CheckpointPolicy

import graphreg
from graphreg.compiler import inductor_passes
from graphreg.compiler.joint_graph import input_gradients, merge_sums, recompute_masks, same_forms, simplify, weight_gradients

aten = torch.ops.aten


def graph_of(function: Callable[..., Any], *inputs: Tensor) -> fx.GraphModule:
    table = get_decompositions([aten.transpose, aten.detach])  # as in the graphs that Inductor is given
    return make_fx(function, table, tracing_mode="fake")(*inputs)  # type: ignore[arg-type]


def targets(module: fx.GraphModule) -> list[str]:
    return [node.target._schema.name.partition("::")[2] for node in module.graph.nodes if isinstance(node.target, torch._ops.OpOverload)]


def changed(function: Callable[..., Any], change: Callable[[fx.Graph], int], *inputs: Tensor) -> tuple[int, list[str]]:
    """How often the graph of a function was changed, and its operators then; its values are as before."""
    module = graph_of(function, *inputs)
    before = module(*inputs)
    count = change(module.graph)
    module.recompile()
    module.graph.lint()
    torch.testing.assert_close(module(*inputs), before, rtol=1e-12, atol=1e-12)
    assert all("val" in node.meta for node in module.graph.nodes if node.op == "call_function")
    return count, targets(module)


X = torch.randn(2, 3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("function", "dims"),
    [
        (lambda x: x.sum([0], True).sum([3], True).sum([2], True), [0, 2, 3]),
        (lambda x: x.sum([0]).sum([2]).sum([1]), [0, 2, 3]),
        (lambda x: x.sum([1]).sum([-1]), [1, 3]),
        (lambda x: x.sum([-1], True).sum([-2], True), [2, 3]),
    ],
)
def test_sums_of_sums_are_one(function: Any, dims: list[int]) -> None:
    module = graph_of(function, X)
    count = merge_sums(module.graph)
    (only,) = module.graph.find_nodes(op="call_function", target=aten.sum.dim_IntList)
    assert only.args[1] == dims and count == len(dims) - 1
    assert changed(function, merge_sums, X) == (count, ["sum"])


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.sum([0], True).sum([0]),  # one keeps its axis
        lambda x: (y := x.sum([0])).sum([0]) + y.mean(),  # the first is read elsewhere
        lambda x: x.sum([0], dtype=torch.float32).sum([0]),
        lambda x: aten.sum.dim_IntList(x, []).unsqueeze(0).sum([0]),
    ],
)
def test_sums_that_stay(function: Any) -> None:
    count, after = changed(function, merge_sums, X)
    assert count == 0 and after.count("sum") == 2


def test_one_form_of_axes_makes_equal_sums_equal() -> None:
    def function(x: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
        one = x - mean.unsqueeze(0).unsqueeze(2).unsqueeze(3)
        other = x - mean.unsqueeze(1).unsqueeze(1).unsqueeze(0)
        return one.sum([0, 2, 3]), other.sum([0, 2, 3], True)

    mean = torch.randn(3, dtype=torch.float64)
    assert changed(function, same_forms, X, mean)[0] == 3
    module = graph_of(function, X, mean)
    same_forms(module.graph)
    module.graph.eliminate_dead_code()
    texts = [(n.target, tuple(map(str, n.args[1:]))) for n in module.graph.nodes if n.op == "call_function"]
    assert texts.count((aten.sum.dim_IntList, ("[0, 2, 3]",))) == 2
    assert texts.count((aten.view.default, ("[1, 3, 1, 1]",))) == 3
    assert "unsqueeze" not in targets(module)


def test_axes_of_more_than_a_vector_stay() -> None:
    assert changed(lambda x: x.unsqueeze(0).unsqueeze(0), same_forms, X) == (0, ["unsqueeze", "unsqueeze"])


def backward(mask: list[bool], stride: int, padding: int, dilation: int, groups: int, transposed: bool = False) -> Any:
    pair = [stride, stride], [padding, padding], [dilation, dilation]
    return lambda g, x, w: next(
        out for out in aten.convolution_backward(g, x, w, None, *pair, transposed, [0, 0], groups, mask) if out is not None
    )


def values(stride: int, padding: int, dilation: int, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient, the input and the weight of a convolution of 11 x 8 values, which some strides do not reach the end of."""
    torch.manual_seed(0)
    x, w = torch.randn(2, 4, 11, 8, dtype=torch.float64), torch.randn(6, 4 // groups, 3, 2, dtype=torch.float64)
    y = torch.nn.functional.conv2d(x, w, None, stride, padding, dilation, groups)
    return torch.randn_like(y), x, w


FORMS = [(1, 0, 1, 1), (1, 1, 1, 1), (2, 1, 1, 1), (3, 0, 1, 1), (1, 2, 2, 1), (2, 1, 2, 1)]


@pytest.mark.parametrize("form", [*FORMS, (2, 1, 1, 2)])
def test_the_gradient_of_an_input_is_a_convolution(form: tuple[int, int, int, int]) -> None:
    function = backward([True, False, False], *form)
    assert changed(function, input_gradients, *values(*form)) == (1, ["convolution"])


def test_other_gradients_of_convolutions_stay() -> None:
    for mask in ([False, True, False], [True, True, False]):
        assert changed(backward(mask, 1, 0, 1, 1), input_gradients, *values(1, 0, 1, 1)) == (0, ["convolution_backward"])


@pytest.mark.parametrize("form", [*FORMS, (2, 1, 1, 2)])
def test_the_gradient_of_a_weight_takes_its_values_as_they_lie(form: tuple[int, int, int, int]) -> None:
    """As torch itself writes the second derivative of a convolution; with groups it writes something else, which stays."""
    g, x, w = values(*form)
    options = form[0], form[1], form[2], form[3]

    def second(g: Tensor, x: Tensor, w: Tensor, h: Tensor) -> tuple[Tensor, ...]:
        g, x, w = (t.detach().requires_grad_() for t in (g, x, w))
        y = torch.nn.functional.conv2d(x, w, None, *options)
        (pulled,) = torch.autograd.grad(y, x, g, create_graph=True)
        return torch.autograd.grad(pulled, (g, w), h)

    h = torch.randn_like(x)
    count, after = changed(second, weight_gradients, g, x, w, h)
    assert count == (form[3] == 1)
    assert after.count("convolution_backward") == count
    assert (after.count("permute") == 0) == (count == 1)


@pytest.mark.parametrize("change", ["no weight", "bias", "another form"])
def test_a_convolution_of_transposed_values_that_is_no_gradient_stays(change: str) -> None:
    g, x, w = values(1, 0, 1, 1)

    def function(g: Tensor, x: Tensor, w: Tensor) -> Tensor:
        bias = x.new_zeros(6) if change == "bias" else None
        found = aten.convolution(x.permute(1, 0, 2, 3), g.permute(1, 0, 2, 3), bias, [1, 1], [0, 0], [1, 1], False, [0, 0], 1)
        found = found.permute(1, 0, 2, 3)
        if change == "no weight":
            return found
        return found.sum() + aten.convolution(x, w, None, [1, 1], [int(change != "bias")] * 2, [1, 1], False, [0, 0], 1).sum()

    assert changed(function, weight_gradients, g, x, w)[0] == 0


def test_masks_are_computed_again_from_outputs_that_are_kept() -> None:
    module = graph_of(lambda x: (torch.relu(x) <= 0, x > 1, x.int() <= 0, torch.relu(x) <= x), X)
    assert recompute_masks(module.graph) == 2
    relu, first = (next(n for n in module.graph.nodes if n.target is t) for t in (aten.relu.default, aten.le.Scalar))
    assert relu.meta["recompute"] == CheckpointPolicy.MUST_SAVE
    assert first.meta["recompute"] == CheckpointPolicy.MUST_RECOMPUTE
    tagged = [str(n.target) for n in module.graph.nodes if "recompute" in n.meta]
    assert tagged == ["aten.relu.default", "aten.le.Scalar", "aten.gt.Scalar"]


def test_everything_is_done() -> None:
    def function(x: Tensor) -> Tensor:
        return torch.where(torch.relu(x) <= 0, 0, x).sum([0], True).sum([3], True)

    module = graph_of(function, X)
    simplify(module.graph)
    assert targets(module).count("sum") == 1
    assert any("recompute" in n.meta for n in module.graph.nodes)


@pytest.mark.parametrize("differentiates", [True, False])
def test_it_is_there_where_a_penalty_differentiates(monkeypatch: pytest.MonkeyPatch, differentiates: bool) -> None:
    seen: list[int] = []
    monkeypatch.setattr(inductor_passes, "simplify", lambda graph: seen.append(1))
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    penalties: dict[str, Any] = {"contractive": 0.1} if differentiates else {"hidden_l1": 0.1}
    torch.compiler.reset()
    with inductor_config.patch(fx_graph_cache=False), functorch_config.patch(enable_autograd_cache=False):
        torch.compile(graphreg.regularize(model, **penalties))(torch.randn(3, 4))
    assert bool(seen) == differentiates


def test_sizes_that_change_are_left_alone() -> None:
    """With numbers in place of symbols, a compiled module with ``contractive`` and a strided convolution failed at another size."""

    def function(g: Tensor, x: Tensor, w: Tensor) -> Any:
        mask = [True, False, False]
        found = aten.convolution_backward(g, x, w, None, [2, 2], [0, 0], [1, 1], False, [0, 0], 1, mask)[0]
        return found, torch.var(x, [0, 2, 3], keepdim=True), torch.sum(x, [0], True)

    x, w = torch.randn(2, 3, 9, 9), torch.randn(4, 3, 3, 3)
    g = torch.nn.functional.conv2d(x, w, stride=2)
    table = get_decompositions([aten.transpose, aten.detach])
    for mode, count in (("fake", 1), ("symbolic", 0)):
        module = make_fx(function, table, tracing_mode=mode)(g, x, w)  # type: ignore[arg-type]
        assert (input_gradients(module.graph), bool(same_forms(module.graph))) == (count, bool(count)), mode
