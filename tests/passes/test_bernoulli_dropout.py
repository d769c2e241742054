from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import graphreg
from graphreg.passes import BernoulliDropout
from two_layers import BEFORE, TwoLayers, X, text


def test_before_and_after() -> None:
    model = TwoLayers()
    module = graphreg.regularize(model, BernoulliDropout("act", 0.5), rng=0)
    assert (
        text(module.code)
        == """key = self.graphreg_rules.key()
a = self.a(x)
act = self.act(a)
act_dropout = self.graphreg_rules.act_dropout(act, key)
b = self.b(act_dropout)
return graphreg_Regularized(b, {})"""
    )
    assert text(graphreg.strip(module).code) == BEFORE


def test_by_hand() -> None:
    """h = [[1, 2], [3, 0]]; what is kept is doubled, the rest is 0, and the gradient goes the same way."""
    module = graphreg.regularize(TwoLayers(), BernoulliDropout("act", 0.5), rng=0)
    seen: list[torch.Tensor] = []
    module.graphreg_rules.act_dropout.register_forward_hook(lambda m, a, out: seen.append(out))  # type: ignore[union-attr]
    x = X.clone().requires_grad_()
    for _ in range(8):
        x.grad = None
        module(x).output.sum().backward()
        kept = seen[-1]
        mask = (kept != 0).float()
        assert torch.equal(kept, torch.tensor([[1.0, 2.0], [3.0, 0.0]]) * 2 * mask)
        slope = torch.tensor([[1.0, 1.0], [1.0, 0.0]])  # relu's
        assert x.grad is not None
        assert torch.equal(x.grad, slope * mask * 2 * torch.tensor([2.0, -4.0]))
    assert len({str(out) for out in seen}) > 1  # another mask at each call


def test_mean_and_variance() -> None:
    """E y = z and Var y = z² p / (1 - p), over 10⁵ draws: Srivastava et al., section 4."""
    p, z = 0.3, 2.0
    module = graphreg.regularize(nn.Sequential(nn.Identity(), nn.Linear(1, 1)), BernoulliDropout("0", p), rng=1)
    seen: list[torch.Tensor] = []
    module.graphreg_rules._0_dropout.register_forward_hook(lambda m, a, out: seen.append(out))
    module(torch.full((100_000, 1), z))
    variance = z * z * p / (1 - p)
    assert abs(float(seen[0].mean()) - z) < 4 * (variance / 1e5) ** 0.5
    assert abs(float(seen[0].var()) - variance) < 0.03


def test_what_must_not_change() -> None:
    model = TwoLayers()
    module = graphreg.regularize(model, BernoulliDropout("act", 0.5), rng=0)
    assert text(graphreg.trace(model).graphs["both"].python_code("self").src) == BEFORE
    assert torch.equal(module.eval()(X).output, model(X))
    assert list(module.state_dict()) == ["a.weight", "b.weight"]
    module.train()
    graphreg.set_strength(module, "dropout", 0.0)
    assert torch.equal(module(X).output, model(X))


def test_frozen_owner() -> None:
    """A splice follows the mode of the module that owns its site."""
    model = TwoLayers()
    module = graphreg.regularize(model, BernoulliDropout("act", 0.5), rng=0)
    model.act.eval()
    assert torch.equal(module(X).output, model(X))
    assert graphreg.rng_state(module)["call"] == 0


def test_second_dropout_at_a_site_is_another() -> None:
    module = graphreg.regularize(nn.Sequential(nn.Identity(), nn.Linear(4, 4)), [BernoulliDropout("0", 0.5)] * 2, rng=0)
    assert "_0_dropout_1 = self.graphreg_rules._0_dropout_1(_0_dropout, key)" in module.code
    z = torch.ones(100, 4)
    kept = [
        copy.deepcopy(module).graphreg_rules.get_submodule(n)(z, module.graphreg_rules.key()) != 0 for n in ("_0_dropout", "_0_dropout_1")
    ]  # type: ignore[union-attr,operator]
    assert not torch.equal(*kept)


@pytest.mark.parametrize("rate", [1.0, 1.5, -0.1, float("nan")])
def test_errors(rate: float) -> None:
    with pytest.raises(graphreg.RegularizerError, match=r"BernoulliDropout: weight.*(in \[0, 1\)|finite)"):
        BernoulliDropout("*", rate)


def test_past_the_limit_of_an_index_eager_masks_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """There the draws are written out, and the mask is of bytes in eager, too: it cannot be scaled in its own memory."""
    model, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 2)), torch.randn(5, 4)
    expected, found = (graphreg.regularize(model, hidden_dropout=0.1, own_dropout="seeded", rng=0) for _ in range(2))
    outputs = expected(x).output
    monkeypatch.setattr("graphreg.rng.noise.LIMIT", 4)
    assert torch.equal(found(x).output, outputs)
