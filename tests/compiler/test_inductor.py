"""What module.compile() tells Inductor: sums of a product and an elementwise value stay apart on a CPU, and nothing else changes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import graphreg
from graphreg.compiler.inductor_passes import SLOT, unfuse, with_our_pass

aten = torch.ops.aten


def graph_of(function: Any, *inputs: Tensor) -> torch.fx.GraphModule:
    return make_fx(function, tracing_mode="fake")(*inputs)


def targets(module: torch.fx.GraphModule) -> list[str]:
    return [str(node.target) for node in module.graph.nodes if node.op == "call_function"]


A, B, C = torch.randn(4, 5), torch.randn(5, 6), torch.randn(4, 6)


def test_a_sum_with_an_elementwise_value_is_taken_apart() -> None:
    module = graph_of(lambda a, b, c: aten.addmm(c * 2, a, b), A, B, C)
    before = module(A, B, C)
    assert targets(module) == ["aten.mul.Tensor", "aten.addmm.default"]
    assert unfuse(module.graph) == 1
    module.recompile()
    assert targets(module) == ["aten.mul.Tensor", "aten.mm.default", "aten.add.Tensor"]
    assert all("val" in node.meta for node in module.graph.nodes if node.op == "call_function")
    torch.testing.assert_close(module(A, B, C), before)
    module.graph.lint()


def read_twice(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    x = c * 2  # written to memory anyway
    return aten.addmm(x, a, b) + x


@pytest.mark.parametrize(
    "function",
    [
        lambda a, b, c: aten.addmm(c, a, b),  # an input: in memory already
        lambda a, b, c: aten.addmm((c * 2)[0], a, b),  # a bias: addmm's own kernel broadcasts it
        lambda a, b, c: aten.addmm(c * 2, a, b, beta=0.5),
        read_twice,
        lambda a, b, c: aten.addmm(aten.mm(a, b), a, b),
    ],
)
def test_what_stays(function: Any) -> None:
    module = graph_of(function, A, B, C)
    before = targets(module)
    assert unfuse(module.graph) == 0
    assert targets(module) == before


def test_the_options() -> None:
    ours = with_our_pass({"fullgraph": True})
    assert ours["fullgraph"] is True and list(ours["options"]) == [SLOT]
    assert list(with_our_pass({"options": {"max_autotune": False}})["options"]) == ["max_autotune", SLOT]
    for chosen in ({"backend": "aot_eager"}, {"mode": "reduce-overhead"}, {"options": {SLOT: None}}):
        assert with_our_pass(chosen) == chosen


def test_compiled_in_place_it_is_the_same_function() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3))
    module = graphreg.regularize(model, hidden_dropout=0.2, hidden_l1=0.1, weight_l2=0.1, rng=1)
    twin, x = copy.deepcopy(module), torch.randn(32, 16)
    seen: list[int] = []

    class Counting(type(with_our_pass({})["options"][SLOT])):  # type: ignore[misc]
        def __call__(self, graph: torch.fx.Graph) -> None:
            seen.append(unfuse(graph))

        def uuid(self) -> Any:
            return None

    twin.compile(fullgraph=True, options={SLOT: Counting()})
    for _ in range(2):
        grads = []
        for form in (module, twin):
            form.zero_grad()
            output, penalties = form(x)
            (output.square().mean() + sum(penalties.values())).backward()
            grads.append([output, *penalties.values(), *(p.grad for p in form.parameters())])
        for eager, compiled in zip(*grads, strict=True):
            torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-6)
    assert sum(seen) >= 4  # the gradients of three weights and of a hidden value


def test_regularize_compiles_with_it() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    module = graphreg.regularize(model, hidden_dropout=0.2, weight_l2=0.1, rng=1, compile=True)
    plain = graphreg.regularize(model, hidden_dropout=0.2, weight_l2=0.1, rng=1)
    x = torch.randn(5, 8)
    torch.testing.assert_close(module(x), plain(x), rtol=1e-5, atol=1e-6)
