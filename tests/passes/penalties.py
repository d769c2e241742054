"""What the tests of penalties have in common: the code that a penalty gives on ``TwoLayers``, and what holds for every penalty."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import graphreg
from graphreg import Penalty
from two_layers import BEFORE, TwoLayers, X, number, text


class Classifier(nn.Module):
    """Its logits are its input."""

    def __init__(self, classes: int = 2) -> None:
        super().__init__()
        self.fc = nn.Linear(classes, classes, bias=False)
        with torch.no_grad():
            self.fc.weight.copy_(torch.eye(classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


def on_values(name: str) -> str:
    """The emitted code of ``TwoLayers`` with a penalty on ``act``."""
    return f"""a = self.a(x)
act = self.act(a)
act_{name} = self.graphreg_rules.act_{name}(act)
b = self.b(act)
{name} = self.graphreg_rules.{name}(act_{name})
return graphreg_Regularized(b, {{'{name}': {name}}})"""


def on_parameters(name: str) -> str:
    """The emitted code of ``TwoLayers`` with a penalty on its two weights."""
    return f"""a = self.a(x)
act = self.act(a)
b = self.b(act)
a_weight = self.a.weight
b_weight = self.b.weight
{name} = self.graphreg_rules.{name}(a_weight, b_weight)
return graphreg_Regularized(b, {{'{name}': {name}}})"""


def before_and_after(expected: str, model: nn.Module | None = None, before: str = BEFORE, **keyword: object) -> None:
    """A keyword gives the expected code, and ``strip`` gives the code from before."""
    module = graphreg.regularize(model or TwoLayers(), **keyword)
    assert text(module.code) == expected
    assert text(graphreg.strip(module).code) == before


def of(regularizer: Penalty, model: nn.Module | None = None, x: Tensor = X) -> float:
    """The penalty of a call."""
    (penalty,) = graphreg.regularize(model or TwoLayers(), regularizer)(x).penalties.values()
    assert penalty.dim() == 0 and penalty.dtype == torch.float32
    return number(penalty)


def random(*shape: int) -> Tensor:
    """Normal numbers in float64, the same each time."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def agrees(regularizer: Penalty, theirs: Callable[[Tensor], Tensor], value: Tensor) -> None:
    """The formula is theirs, and its gradients are those of differences, the second ones, too."""
    torch.testing.assert_close(regularizer(value), theirs(value), rtol=1e-10, atol=1e-12)
    inputs = value.clone().requires_grad_()
    assert torch.autograd.gradcheck(regularizer, inputs)
    assert torch.autograd.gradgradcheck(regularizer, inputs)


def same_compiled(regularizer: Penalty, model: nn.Module | None = None, x: Tensor = X) -> None:
    """The penalty and its gradients are the same in eager and compiled."""
    model = model or TwoLayers()
    module = graphreg.regularize(model, regularizer)
    found = []
    for run in (module, torch.compile(module, backend="aot_eager", fullgraph=True)):
        (penalty,) = run(x).penalties.values()
        gradients = torch.autograd.grad(penalty, list(model.parameters()), allow_unused=True, materialize_grads=True)
        found.append([penalty.detach(), *gradients])
    assert any(gradient.any() for gradient in found[0][1:])
    torch.testing.assert_close(found[1], found[0], rtol=1e-6, atol=1e-7)


def nothing_else_changes(regularizer: Penalty, model: nn.Module | None = None, x: Tensor = X) -> None:
    """The output is the model's in both modes, also at strength 0, where the penalty and its gradient are 0; the state is the model's."""
    model = model or TwoLayers()
    module = graphreg.regularize(model, regularizer)
    (name,) = graphreg.strengths(module)
    assert list(module.state_dict()) == list(model.state_dict())
    in_train = number(module(x).penalties[name])
    for mode in (True, False):
        assert torch.equal(module.train(mode)(x).output, model(x))
        assert number(module(x).penalties[name]) == in_train != 0
    graphreg.set_strength(module, name, 0.0)
    output, penalties = module.train()(x)
    assert torch.equal(output, model(x)) and number(penalties[name]) == 0
    penalties[name].backward()
    assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)


def refused(sentence: str, make: Callable[[], object]) -> None:
    """It raises a RegularizerError whose message is, or begins with, the sentence."""
    with pytest.raises(graphreg.RegularizerError) as raised:
        make()
    assert str(raised.value).startswith(sentence), str(raised.value)
