from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import graphreg
from graphreg.passes import ConcreteDropout
from penalties import random
from spliced import Given, refuses
from two_layers import BEFORE, TwoLayers, X, number, text


def by_the_paper(z: Tensor, u: Tensor, p: Tensor) -> Tensor:
    """Equation 5, and the scale of dropout."""
    dropped = torch.sigmoid((torch.log(p) - torch.log(1 - p) + torch.log(u) - torch.log(1 - u)) / 0.1)
    return z * (1 - dropped) / (1 - p)


def entropy(p: float) -> float:
    return -p * math.log(p) - (1 - p) * math.log(1 - p)


def test_before_and_after() -> None:
    module = graphreg.regularize(TwoLayers(), concrete_dropout=0.5, example_inputs=X, rng=0)
    assert (
        text(module.code)
        == """key = self.graphreg_rules.key()
a = self.a(x)
act = self.act(a)
act_concrete_dropout = self.graphreg_rules.act_concrete_dropout(act, key)
b = self.b(act_concrete_dropout)
concrete_dropout = self.graphreg_rules.concrete_dropout()
return graphreg_Regularized(b, {'concrete_dropout': concrete_dropout})"""
    )
    assert text(graphreg.strip(module).code) == BEFORE


def test_it_is_that_of_the_paper() -> None:
    """One draw for each element; the gradients of the value and of the rate, too."""
    z, u = random(3, 4).requires_grad_(), torch.rand(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    logit = torch.tensor([-0.4], dtype=torch.float64, requires_grad=True)
    ours = ConcreteDropout("0", 0.1)(z, Given(u), {"logit": logit, "units": torch.tensor(4)})
    theirs = by_the_paper(z, u, torch.sigmoid(logit))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    of_ours, of_theirs = (torch.autograd.grad(each.square().sum(), (z, logit), retain_graph=True) for each in (ours, theirs))
    torch.testing.assert_close(of_ours, of_theirs, rtol=1e-8, atol=1e-9)
    assert of_ours[1].all()


@pytest.mark.parametrize("p", [0.1, 0.5, 1e-6])
def test_the_penalty_by_hand(p: float) -> None:
    """The negative entropy of one mask; the sum has one for each of the 2 units of act."""
    for reduction, count in (("mean", 1), ("sum", 2)):
        module = graphreg.regularize(TwoLayers(), ConcreteDropout("act", 3.0, start=p, reduction=reduction), example_inputs=X, rng=0)
        for mode in (True, False):
            assert number(module.train(mode)(X).penalties["concrete_dropout"]) == pytest.approx(-3 * count * entropy(p), rel=1e-4)


def test_the_gradient_of_the_penalty_is_that_of_the_entropy() -> None:
    logit = torch.tensor([-2.0, 0.0, 3.0, -60.0], dtype=torch.float64, requires_grad=True)
    penalty = ConcreteDropout("0", 1.0).penalty({"logit": logit, "units": torch.tensor(7)})
    (gradient,) = torch.autograd.grad(penalty, logit)
    p = torch.sigmoid(logit.detach())
    torch.testing.assert_close(gradient, logit.detach() * p * (1 - p))  # dH/dp = -logit, dp/dlogit = p (1 - p)


def test_rate_and_mean_of_many_draws() -> None:
    model, x = nn.Sequential(nn.Identity(), nn.Identity()), torch.ones(100, 1000)
    module = graphreg.regularize(model, ConcreteDropout("0", 0.1, start=0.3), example_inputs=x, rng=0)
    y = module(x).output
    assert float((y < 0.7).double().mean()) == pytest.approx(0.3, abs=0.01)  # most elements are near 0 or 1/0.7
    assert float(y.detach().double().mean()) == pytest.approx(1, abs=0.02)
    assert not torch.equal(module(x).output, y)
    assert torch.equal(module.eval()(x).output, x) and graphreg.rng_state(module)["call"] == 2


def test_compiled_it_is_eager() -> None:
    torch._dynamo.reset()
    results = []
    for compiled in (False, True):
        module = graphreg.regularize(TwoLayers(), ConcreteDropout("act", 0.2), example_inputs=X, rng=0)
        run = torch.compile(module, backend="aot_eager", fullgraph=True) if compiled else module
        calls = [run(X) for _ in range(2)]
        sum(value.sum() for call in calls for value in (call.output.square(), call.penalties["concrete_dropout"])).backward()
        results.append([*(call.output for call in calls), *(p.grad for p in module.parameters())])
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=1e-7)
    assert results[0][-1] is not None and results[0][-1].all()


def test_the_count_of_units_is_saved_and_the_rate_is_a_parameter() -> None:
    module = graphreg.regularize(TwoLayers(), ConcreteDropout("act", 0.1), example_inputs=X, rng=0)
    assert graphreg.rng_state(module)["state"] == {"concrete_dropout": {"act": {"units": torch.tensor(2)}}}
    assert list(module.state_dict())[-1] == "graphreg_rules.concrete_dropout.state.act.logit"


def test_what_is_refused() -> None:
    for start in (0.0, 1):
        message = r"ConcreteDropout: start=.* is not allowed; start must be a number above 0 and below 1\."
        refuses(message, ConcreteDropout, "0", 0.1, start=start)
    refuses(r"ConcreteDropout: weight=-1\.0 is not allowed; weight must be 0 or more\.", ConcreteDropout, "0", -1)
