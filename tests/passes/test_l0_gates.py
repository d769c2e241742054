from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import graphreg
from graphreg.passes import L0Gates
from penalties import random
from spliced import Given, refuses
from two_layers import BEFORE, TwoLayers, X, number, text

ALPHA = torch.tensor([0.3, -1.2, 4.0, -9.0], dtype=torch.float64)


def by_the_paper(u: Tensor, log_alpha: Tensor) -> Tensor:
    """Equations 10 and 11, as they stand."""
    beta, gamma, zeta = 2 / 3, -0.1, 1.1
    s = 1 / (1 + torch.exp(-(torch.log(u) - torch.log(1 - u) + log_alpha) / beta))
    return torch.minimum(torch.ones(()), torch.maximum(torch.zeros(()), s * (zeta - gamma) + gamma))


def test_before_and_after() -> None:
    module = graphreg.regularize(TwoLayers(), l0_gates=0.5, example_inputs=X, rng=0)
    assert (
        text(module.code)
        == """key = self.graphreg_rules.key()
a = self.a(x)
act = self.act(a)
act_l0_gates = self.graphreg_rules.act_l0_gates(act, key)
b = self.b(act_l0_gates)
l0_gates = self.graphreg_rules.l0_gates()
return graphreg_Regularized(b, {'l0_gates': l0_gates})"""
    )
    assert text(graphreg.strip(module).code) == BEFORE
    assert "# l0_gates: the penalty of what it learns at act" in str(graphreg.diff(module))


def test_the_gates_are_those_of_the_paper() -> None:
    """With one draw for each unit, gradients of the value and of log_alpha included."""
    z, u = random(5, 4).requires_grad_(), torch.tensor([[0.2, 0.5, 0.9, 0.4]], dtype=torch.float64)
    log_alpha = ALPHA.clone().requires_grad_()
    ours = L0Gates("0", 0.1)(z, Given(u), {"log_alpha": log_alpha})
    theirs = z * by_the_paper(u, log_alpha)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    of_ours, of_theirs = (torch.autograd.grad(each.square().sum(), (z, log_alpha), retain_graph=True) for each in (ours, theirs))
    torch.testing.assert_close(of_ours, of_theirs, rtol=1e-9, atol=1e-10)
    assert of_ours[1][:2].all() and not ours[:, 3].any()  # a gate of exactly 0


def test_eval_and_penalty_by_hand() -> None:
    """sigmoid(0) = 1/2 is a gate of 1.2/2 - 0.1 = 0.5. The drawn gate is 0 for s below 1/12, so for u below 1/(1 + 11**(2/3))."""
    gates, state = L0Gates("0", 1.0), {"log_alpha": torch.tensor([0.0, 9.0, -9.0])}
    assert torch.allclose(gates.in_eval(torch.ones(1, 3), state), torch.tensor([[0.5, 1.0, 0.0]]))
    probability = 1 / (1 + 11 ** (-2 / 3))
    assert number(gates.penalty({"log_alpha": torch.zeros(2)})) == pytest.approx(probability)
    assert number(L0Gates("0", 1.0, reduction="sum").penalty({"log_alpha": torch.zeros(2)})) == pytest.approx(2 * probability)
    for u in (1 - probability - 1e-3, 1 - probability + 1e-3):
        gate = by_the_paper(torch.tensor(u), torch.zeros(()))
        assert bool(gate > 0) == (u > 1 - probability)


def test_the_share_of_open_gates_is_the_penalty() -> None:
    module = graphreg.regularize(nn.Sequential(nn.Identity(), nn.Identity()), L0Gates("0", 1.0), example_inputs=torch.ones(1, 20000), rng=1)
    output, penalties = module(torch.ones(3, 20000))
    assert torch.equal(output[0], output[1]) and torch.equal(output[0], output[2])  # one draw a unit
    assert float((output[0] > 0).double().mean()) == pytest.approx(number(penalties["l0_gates"]), abs=0.01)
    assert not torch.equal(module(torch.ones(3, 20000)).output, output)


class Conv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act, self.fc = nn.Conv2d(1, 3, 2), nn.ReLU(), nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.act(self.conv(x)).flatten(1))  # type: ignore[no-any-return]


IMAGES = torch.randn(2, 1, 3, 3, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("options", "axis"), [({}, 1), ({"axis": 2}, 2), ({"axis": -1}, 3)])
def test_the_units_of_a_convolution_are_its_channels(options: dict[str, int], axis: int) -> None:
    model = Conv()
    module = graphreg.regularize(model, L0Gates("act", 0.1, start=0.1, **options), example_inputs=IMAGES, rng=0)
    log_alpha = module.get_parameter("graphreg_rules.l0_gates.state.act.log_alpha")
    assert log_alpha.shape == (model.act(model.conv(IMAGES)).shape[axis],)
    assert torch.allclose(log_alpha, torch.full_like(log_alpha, math.log(1 / 9)))
    with torch.no_grad():
        log_alpha.copy_(torch.linspace(-1, 3, len(log_alpha)))
    shape = [1] * 4
    shape[axis] = -1
    gates = (torch.sigmoid(log_alpha) * 1.2 - 0.1).clamp(0, 1).view(shape)
    by_hand = model.fc((model.act(model.conv(IMAGES)) * gates).flatten(1))
    torch.testing.assert_close(module.eval()(IMAGES).output, by_hand)


def test_trained_it_closes_gates_of_what_does_not_matter() -> None:
    """The second unit does not matter. The gates are the same compiled."""
    torch._dynamo.reset()
    results = []
    for compiled in (False, True):
        model = nn.Sequential(nn.Identity(), nn.Identity())
        module = graphreg.regularize(model, L0Gates("0", 0.5, reduction="sum"), example_inputs=torch.ones(1, 2), rng=0)
        run = torch.compile(module, backend="aot_eager", fullgraph=True) if compiled else module
        optimizer = torch.optim.SGD(module.parameters(), 1.0)
        for _ in range(30):
            output, penalties = run(torch.ones(4, 2))
            optimizer.zero_grad()
            ((output[:, 0] - 1).square().mean() * 9 + penalties["l0_gates"]).backward()
            optimizer.step()
        results.append(module.eval()(torch.ones(1, 2)).output.detach())
    torch.testing.assert_close(results[0], results[1])
    assert results[0][0, 0] > 0.8 and results[0][0, 1] == 0


def test_at_strength_0_the_gates_act_all_the_same() -> None:
    module = graphreg.regularize(TwoLayers(), L0Gates("act", 0.0), example_inputs=X, rng=0)
    output, penalties = module(X)
    assert not torch.equal(output, TwoLayers()(X)) and number(penalties["l0_gates"]) == 0
    assert not L0Gates.off_at_zero


def test_what_is_refused() -> None:
    for start in (0.0, 1, "half"):
        refuses(r"L0Gates: start=.* is not allowed; start must be a number above 0 and below 1\.", L0Gates, "0", 0.1, start=start)
    refuses(r"L0Gates: reduction='max' is not allowed; reduction must be 'mean' or 'sum'\.", L0Gates, "0", 0.1, reduction="max")
    refuses(r"L0Gates: weight=-1\.0 is not allowed; weight must be 0 or more\.", L0Gates, "0", -1)
    refuses(r"L0Gates: axis='last' is not allowed; give the axis of the units, a whole number, or None", L0Gates, "0", 0.1, axis="last")
    with pytest.raises(graphreg.RegularizerError, match=r"L0Gates at act: axis=2 is out of range for a value of shape \(2, 2\)"):
        graphreg.regularize(TwoLayers(), L0Gates("act", 0.1, axis=2), example_inputs=X)
