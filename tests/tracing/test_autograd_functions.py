"""A call of a model's own ``torch.autograd.Function`` is one node of the graph, with its own derivative."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphreg

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


class Rounds(torch.autograd.Function):
    """Passes the gradient through, times ``k``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, k: float) -> Tensor:
        ctx.k = k
        return x.round()

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        return grad * ctx.k, None


class Two(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        return x + 1, x * 2

    @staticmethod
    def backward(ctx: Any, a: Any, b: Any) -> Any:
        return 3 * a + b


class Doubles(torch.autograd.Function):
    """Writes into its argument."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        return x.mul_(2)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        return grad * 2


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Any:
        one, two = Two.apply(Rounds.apply(self.a(x), 2.0))
        return self.b((one * two).relu())


class Whole(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net, self.last = Net(), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Any:
        return self.last(self.net(x))


def gradients(run: Any, model: nn.Module) -> list[Tensor]:
    x = X.clone().requires_grad_()
    value = run(x)
    value = value.output if isinstance(value, graphreg.Regularized) else value
    return [value, *torch.autograd.grad(value.square().sum(), [x, *model.parameters()])]


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo's own, of an autograd.Function
@pytest.mark.parametrize("kind", [Net, Whole])
def test_values_and_gradients_are_the_models(kind: type[nn.Module]) -> None:
    plain, model = kind(), kind()
    model.load_state_dict(plain.state_dict())
    expected = gradients(plain, plain)
    module = graphreg.regularize(model, weight_l2=0.1, hidden_dropout=0.0, example_inputs=X)
    for each in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert all(map(torch.equal, gradients(each, each), expected))
    if kind is Whole:
        compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
        assert all(map(torch.equal, gradients(compiled, module), expected))
    placed = graphreg.regularize_(model, hidden_dropout=0.0)
    assert all(map(torch.equal, gradients(placed, placed), expected))


def test_names_and_the_graph() -> None:
    traced = graphreg.trace(Net(), X)
    assert [site.name for site in traced.values] == ["x", "a", "rounds", "two", "two:0", "two:1", "mul", "relu", "b"]
    assert "= test_autograd_functions_Rounds(a, 2.0)" in graphreg.regularize(Net(), hidden_dropout=0.1).code
    model = Net()
    measured = graphreg.regularize(model, hidden_l1={"rounds": 1.0})(X).penalties["hidden_l1"]
    torch.testing.assert_close(measured, model.a(X).round().abs().mean())


class Writes(Net):
    def forward(self, x: Tensor) -> Any:
        return self.b(Doubles.apply(self.a(x)))


def test_what_it_writes_into_is_measured_before() -> None:
    model, plain = Writes(), Writes()
    result = graphreg.regularize(model, hidden_l1={"a": 1.0}, example_inputs=X)(X)
    assert torch.equal(result.output, plain(X))
    torch.testing.assert_close(result.penalties["hidden_l1"], plain.a(X).abs().mean())
    (result.output.sum() + result.penalties["hidden_l1"]).backward()
    (plain(X).sum() + plain.a(X).abs().mean()).backward()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


class ByModule(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, module: Any) -> Tensor:
        return x * module.factor  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        return grad, None


class Passes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.factor = nn.Linear(4, 4), 2.0

    def forward(self, x: Tensor) -> Tensor:
        return ByModule.apply(self.layer(x), self)  # type: ignore[no-any-return]


@pytest.mark.parametrize("example_inputs", [None, X])
def test_a_module_as_argument(example_inputs: Tensor | None) -> None:
    with pytest.raises(graphreg.TraceError, match="it passes the model itself to an operation"):
        graphreg.regularize(Passes(), weight_l2=0.1, example_inputs=example_inputs)
    model = nn.Sequential(Passes(), nn.Tanh())
    module = graphreg.regularize(model, weight_l2=0.1, example_inputs=example_inputs)
    assert torch.equal(module(X).output, model(X))
