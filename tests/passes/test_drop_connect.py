from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphreg
from graphreg.passes import DropConnect
from parameter_splices import acts_on_the_weight_alone, of_weight, same_compiled_weights
from two_layers import BEFORE, TwoLayers, X, text


def test_before_and_after() -> None:
    module = graphreg.regularize(TwoLayers(), weight_dropout={"weight": 0.5, "pattern": "a.weight"}, rng=0)
    assert (
        text(module.code)
        == """key = self.graphreg_rules.key()
a_weight = self.a.weight
a_weight_weight_dropout = self.graphreg_rules.a_weight_weight_dropout(a_weight, key)
a_layer = self.a
a = graphreg_ir_layer_calls_call_with(x, graphreg_layer = a_layer, graphreg_parameters = {'weight': a_weight_weight_dropout})
act = self.act(a)
b = self.b(act)
return graphreg_Regularized(b, {})"""
    )
    assert text(graphreg.strip(module).code) == BEFORE


def test_the_rate_and_the_scale() -> None:
    """Elements are 0 or w / (1 - p); of 10⁵ a share p is 0, and two calls drop others."""
    p, w = 0.3, torch.full((1000, 100), 2.0)
    first, second = of_weight(DropConnect("*", p), w, calls=2)
    torch.testing.assert_close(first.unique(), torch.tensor([0.0, 2 / 0.7]))
    assert abs(float((first == 0).double().mean()) - p) < 4 * (p * (1 - p) / 1e5) ** 0.5
    assert abs(float(((first == 0) & (second == 0)).double().mean()) - p * p) < 4 * (p * p * (1 - p * p) / 1e5) ** 0.5


def test_wans_layer() -> None:
    """Equation 2 without the activation: r = (M ∘ W) v, one M for the batch, here with the kept weights scaled; and its gradient."""
    layer = nn.Linear(2, 2, bias=False)
    module = graphreg.regularize(nn.Sequential(layer), DropConnect("*", 0.5), rng=3)
    r = module(X).output
    m = torch.linalg.solve(X, r.detach()).T / layer.weight.detach() / 2
    torch.testing.assert_close(m, m.round())
    assert 0 < int(m.sum()) < 4
    r.sum().backward()
    torch.testing.assert_close(layer.weight.grad, 2 * m.round() * X.sum(0))


class WeightDrop(nn.Module):
    """Merity's ``WeightDrop``: the hidden-to-hidden weight is ``F.dropout`` of a raw one, at each call. Here the mask is given."""

    def __init__(self, lstm: nn.LSTM, mask: Tensor) -> None:
        super().__init__()
        self.lstm, self.mask = lstm, mask

    def forward(self, x: Tensor) -> Tensor:
        w_ih, w_hh, b_ih, b_hh = self.lstm.parameters()
        h = c = torch.zeros(x.shape[1], self.lstm.hidden_size)
        outputs, w_hh = [], w_hh * self.mask
        for step in x:
            i, f, g, o = (F.linear(step, w_ih, b_ih) + F.linear(h, w_hh, b_hh)).chunk(4, 1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
            outputs.append(h)
        return torch.stack(outputs)


def test_hidden_to_hidden_weights_of_an_lstm() -> None:
    """One mask for all steps, on these weights alone; values and gradients against the cell written out."""
    torch.manual_seed(0)
    lstm, x, seen = nn.LSTM(3, 4), torch.randn(5, 2, 3), list[Tensor]()
    module = graphreg.regularize(nn.Sequential(lstm), DropConnect("0.weight_hh_*", 0.5), rng=0)
    module.graphreg_rules._0_weight_hh_l0_drop_connect.register_forward_hook(lambda m, args, out: seen.append(out / args[0]))
    out = module(x).output[0]
    assert len(seen) == 1 and 0 < int((seen[0] == 0).sum()) < 64
    out.square().sum().backward()
    gradients = [p.grad for p in lstm.parameters()]
    lstm.zero_grad()
    expected = WeightDrop(lstm, seen[0].detach())(x)
    expected.square().sum().backward()
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(gradients, [p.grad for p in lstm.parameters()])
    assert torch.equal(module.eval()(x).output[0], lstm(x)[0])


def test_compiled_it_is_eager() -> None:
    same_compiled_weights(DropConnect("0.weight_hh_*", 0.5), nn.LSTM(3, 4), torch.linspace(-1, 1, 30).view(5, 2, 3))


def test_what_must_not_change() -> None:
    acts_on_the_weight_alone(DropConnect("*", 0.5))


def test_errors() -> None:
    with pytest.raises(graphreg.RegularizerError, match=r"DropConnect: weight=1\.0 is not allowed; weight must be in \[0, 1\)"):
        DropConnect("*", 1.0)
