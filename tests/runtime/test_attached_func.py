"""penalties="attach" and derivatives other than one backward pass: refused where the gradient would be wrong, right elsewhere."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vjp, vmap

import graphreg
from graphreg.errors import GraphRegError
from graphreg.runtime.rewritten_module import RewrittenModule
from lacking import needs_result

Given = dict[str, Tensor]
PENALTIES: dict[str, dict[str, Any]] = {
    "of parameters": {"weight_l2": 3.0},
    "of values": {"hidden_l1": 2.0},
    "of derivatives": {"contractive": 0.5},
}
X = torch.linspace(-1, 1, 12).view(3, 4)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(torch.tanh(self.body(x)))
        return out


def regularized(kind: str, penalties: Any) -> RewrittenModule:
    torch.manual_seed(0)
    options = {"scale": 1} if penalties == "attach" else {}
    return graphreg.regularize(Net(), penalties=penalties, rng=1, **options, **PENALTIES[kind])


def loss(module: nn.Module, parameters: Given, x: Tensor) -> Tensor:
    """With the penalties that are returned, if they are."""
    given = functional_call(module, parameters, (x,))
    if isinstance(given, graphreg.Regularized):
        return given.output.square().sum() + torch.stack(list(given.penalties.values())).sum()
    value: Tensor = given.square().sum()
    return value


def detached(module: nn.Module) -> Given:
    return {name: p.detach() for name, p in module.named_parameters()}


def by_backward(kind: str, x: Tensor = X) -> Given:
    module = regularized(kind, "return")
    loss(module, dict(module.named_parameters()), x).backward()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in module.named_parameters()}


@pytest.mark.parametrize("penalties", ["attach", "return"])
@pytest.mark.parametrize("kind", PENALTIES)
def test_grad_and_vjp_are_those_of_backward(kind: str, penalties: str) -> None:
    module = regularized(kind, penalties)
    found = grad(lambda p: loss(module, p, X))(detached(module))
    torch.testing.assert_close(found, by_backward(kind))
    module = regularized(kind, penalties)
    _, back = vjp(lambda p: loss(module, p, X), detached(module))
    torch.testing.assert_close(back(torch.ones(()))[0], by_backward(kind))


@pytest.mark.parametrize("penalties", ["attach", "return"])
@pytest.mark.parametrize("kind", PENALTIES)
def test_gradients_of_each_example(kind: str, penalties: str) -> None:
    module = regularized(kind, penalties)
    found = vmap(grad(lambda p, x: loss(module, p, x[None])), (None, 0), randomness="same")(detached(module), X)
    for i, x in enumerate(X):
        torch.testing.assert_close({name: each[i] for name, each in found.items()}, by_backward(kind, x[None]))


def test_an_ensemble_has_the_gradients_of_its_members() -> None:
    """Also of a penalty on derivatives, which records below the level that differentiates."""
    module = regularized("of derivatives", "attach")
    members = [detached(module), {name: 2 * p for name, p in detached(module).items()}]
    stacked = {name: torch.stack([member[name] for member in members]) for name in members[0]}
    found = vmap(grad(lambda p: loss(module, p, X)), randomness="same")(stacked)
    for i, member in enumerate(members):
        alone = regularized("of derivatives", "return")
        expected = grad(lambda p, alone=alone: loss(alone, p, X))(member)
        torch.testing.assert_close({name: each[i] for name, each in found.items()}, expected)


@pytest.mark.parametrize("kind", ["of parameters", "of values"])
def test_a_batch_of_calls_counts_each_call(kind: str) -> None:
    """vmap is a loop: the gradient of a sum over calls, by grad around it and by a backward pass."""
    expected = [by_backward(kind, x[None]) for x in X]
    module = regularized(kind, "attach")
    found = grad(lambda p: vmap(lambda x: loss(module, p, x[None]))(X).sum())(detached(module))
    vmap(lambda x: loss(module, dict(module.named_parameters()), x[None]))(X).sum().backward()
    for name, p in module.named_parameters():
        torch.testing.assert_close(found[name], sum(each[name] for each in expected))
        torch.testing.assert_close(p.grad, sum(each[name] for each in expected))


def test_a_penalty_on_derivatives_under_vmap_alone_is_refused() -> None:
    for penalties in ("attach", "return"):
        module = regularized("of derivatives", penalties)
        with pytest.raises(GraphRegError, match="runs a backward pass of its own, which torch.vmap does not allow"):
            vmap(lambda x, module=module: loss(module, dict(module.named_parameters()), x[None]), randomness="same")(X)


def test_forward_mode_is_refused() -> None:
    module = regularized("of values", "attach")
    with pytest.raises(GraphRegError, match="forward-mode"):
        jvp(lambda p: loss(module, p, X), (detached(module),), (detached(module),))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(GraphRegError, match="forward-mode"):
        module(torch.autograd.forward_ad.make_dual(X, torch.ones_like(X)))


def gradient_penalty(module: nn.Module, x: Tensor) -> Tensor:
    """As in WGAN-GP: of the gradient by the input."""
    given = module(x)
    output = given.output if isinstance(given, graphreg.Regularized) else given
    (slope,) = torch.autograd.grad(output.square().sum(), x, create_graph=True)
    return slope.square().sum()


def nested(module: nn.Module, x: Tensor) -> Tensor:
    """The same by torch.func, twice."""
    inner = grad(lambda x, p: loss(module, p, x))
    return grad(lambda p: inner(x, p).square().sum())(detached(module))["body.weight"]


def not_detached(module: nn.Module, x: Tensor) -> Given:
    """Whose gradient autograd records, and somebody could differentiate."""
    found: Given = grad(lambda p: loss(module, p, x))(dict(module.named_parameters()))
    return found


@pytest.mark.parametrize("differentiate", [gradient_penalty, nested, not_detached])
@pytest.mark.parametrize("kind", PENALTIES)
def test_a_backward_pass_that_is_differentiated_is_refused(kind: str, differentiate: Callable[[nn.Module, Tensor], Any]) -> None:
    with pytest.raises(GraphRegError, match=r"penalties='attach'.*create_graph=True.*penalties='return'"):
        differentiate(regularized(kind, "attach"), X.clone().requires_grad_())


def test_without_attaching_it_is_the_models_own() -> None:
    torch.manual_seed(0)
    model = Net()
    x = X.clone().requires_grad_()
    gradient_penalty(model, x).backward()
    module = regularized("of values", "return")
    gradient_penalty(module, x).backward()
    torch.testing.assert_close([p.grad for p in module.parameters()], [p.grad for p in model.parameters()])


def test_a_compiled_backward_is_not_taken_for_one() -> None:
    """AOTAutograd traces backward; a second derivative of what it compiled it refuses itself."""
    torch._dynamo.reset()
    module = regularized("of values", "attach")
    module.compile(backend="aot_eager", fullgraph=True)
    module(X).square().sum().backward()
    torch.testing.assert_close({name: p.grad for name, p in module.named_parameters()}, by_backward("of values"))
    x = X.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="create_graph|double backward"):
        gradient_penalty(module, x).backward()


@needs_result
def test_a_backend_refuses_it_too() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = torch.compile(Net(), backend=graphreg.backend(inner="eager", penalties="attach", scale=1, hidden_l1=1.0))
        with pytest.raises(GraphRegError, match="create_graph=True"):
            gradient_penalty(module, X.clone().requires_grad_())
