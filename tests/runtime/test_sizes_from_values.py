"""Values whose sizes the values of tensors decide: experts that get no examples, and pooled values under torch.compile."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphreg


class Experts(nn.Module):
    """Each example goes to the experts whose number is below its first feature."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        output = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            chosen = (x[:, 0] > number).nonzero()[:, 0]
            output = output.index_add(0, chosen, expert(x[chosen]))
        return output


def examples(first: float) -> Tensor:
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    x[:, 0] = first
    return x


def test_an_expert_without_examples_is_not_penalized() -> None:
    torch.manual_seed(0)
    model, x = Experts(), examples(1.5)
    module = graphreg.regularize(model, hidden_l1={"weight": 1.0, "pattern": "**@Tanh"}, example_inputs=examples(2.5))
    (penalty,) = module(x).penalties.values()
    by_hand = sum((torch.tanh(expert[0](x)).abs().mean() for expert in model.experts[:2]), torch.zeros(())) / 3
    torch.testing.assert_close(penalty, by_hand)
    penalty.backward()
    gradients = [parameter.grad for parameter in model.experts[:2].parameters()]
    assert all(gradient is None or gradient.isfinite().all() for gradient in gradients)
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in model.experts[2].parameters())


@pytest.mark.parametrize("name", ["hidden_l2", "kl_sparsity", "covariance", "decov", "variance_floor", "hoyer_square"])
def test_nor_does_a_penalty_that_needs_samples_refuse_it(name: str) -> None:
    pattern = "**@Sigmoid" if name == "kl_sparsity" else "**@Tanh"
    model = Experts()
    if name == "kl_sparsity":
        for expert in model.experts:
            expert[1] = nn.Sigmoid()
    module = graphreg.regularize(model, example_inputs=examples(2.5), **{name: {"weight": 0.1, "pattern": pattern}})  # type: ignore[arg-type]
    assert all(penalty.isfinite() for penalty in module(examples(1.5)).penalties.values())


def test_compiled_without_examples_it_is_not_penalized_either() -> None:
    torch.manual_seed(0)
    eager, compiled = (graphreg.regularize(Experts(), hidden_l1={"**@Tanh": 1.0}, example_inputs=examples(2.5)) for _ in range(2))
    compiled.load_state_dict(eager.state_dict())
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        run = torch.compile(compiled, fullgraph=True, backend="aot_eager")
        for first in (2.5, 1.5, -1.0):
            (expected,), (found,) = eager(examples(first)).penalties.values(), run(examples(first)).penalties.values()
            torch.testing.assert_close(found, expected)
        for module, penalty in ((eager, eager(examples(1.5)).penalties), (compiled, run(examples(1.5)).penalties)):
            module.zero_grad()
            penalty["hidden_l1"].backward()
    for name, parameter in eager.named_parameters():
        other = compiled.get_parameter(name)
        gradients = [torch.zeros_like(each) if each.grad is None else each.grad for each in (parameter, other)]
        torch.testing.assert_close(*gradients)


class Pool(nn.Module):
    """Sums the rows of each graph of a batch, as the libraries of graphs do; opaque, since it reads a number out of a tensor."""

    def forward(self, h: Tensor, graph: Tensor) -> Tensor:
        return torch.zeros(int(graph.max()) + 1, h.shape[1]).index_add(0, graph, h)


class Pooled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.pool, self.last, self.act = nn.Linear(4, 8), Pool(), nn.Linear(8, 8), nn.ReLU()

    def forward(self, x: Tensor, graph: Tensor) -> Tensor:
        output: Tensor = self.act(self.last(self.pool(self.first(x), graph)))
        return output


OPTIONS: list[dict[str, Any]] = [
    {"dropout": {"act": 0.4}},
    {"noise": {"act": 0.4}, "gaussian_dropout": {"last": 0.2}},
    {"hidden_l1": {"act": 0.1}, "covariance": {"act": 0.1}},
]


@pytest.mark.parametrize("regularizers", OPTIONS, ids=str)
def test_a_size_that_values_decide_compiles(regularizers: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model, x, graph = Pooled(), torch.randn(6, 4), torch.tensor([0, 0, 1, 1, 2, 2])
    modules = [graphreg.regularize(model, rng=0, example_inputs=(x, graph), **regularizers) for _ in range(2)]
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        compiled = torch.compile(modules[1], fullgraph=True, backend="aot_eager")
        for graph in (torch.tensor([0, 0, 1, 1, 2, 2]), torch.tensor([0, 1, 1, 1, 3, 4])):
            expected, found = modules[0](x, graph), compiled(x, graph)
            torch.testing.assert_close(found.output, expected.output)
            torch.testing.assert_close(found.penalties, expected.penalties)
