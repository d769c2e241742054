from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphreg
from graphreg.passes import HeadDropout
from spliced import acts_in_train_mode_alone, formula, needs_a_rate, refuses_value, same_along, same_compiled, spliced
from two_layers import text


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, 2, 4)).permute(2, 0, 3, 1, 4).unbind()
        heads = F.scaled_dot_product_attention(q, k, v)
        return self.out(heads.transpose(1, 2).flatten(2))


class Fused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.out = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.attention(x, x, x)[0])


def test_before_and_after() -> None:
    model = Attention()
    module = graphreg.regularize(model, head_dropout=0.5, rng=0)
    before = text(graphreg.trace(model).graphs["both"].python_code("self").src)
    attention = "scaled_dot_product_attention = torch._C._nn.scaled_dot_product_attention("
    call = next(line for line in before.splitlines() if line.startswith(attention))
    dropout = "scaled_dot_product_attention_head_dropout = self.graphreg_rules.scaled_dot_product_attention_head_dropout"
    after = before.replace(call, f"{call}\n{dropout}(scaled_dot_product_attention, key)")
    after = after.replace("= scaled_dot_product_attention.transpose", "= scaled_dot_product_attention_head_dropout.transpose")
    after = after.replace("return out", "return graphreg_Regularized(out, {})")
    assert text(module.code) == f"key = self.graphreg_rules.key()\n{after}"
    assert text(graphreg.strip(module).code) == before


def test_by_hand() -> None:
    """Head 1 of the first example and head 0 of the second are dropped, for all positions and features; the rest is doubled."""
    z = torch.arange(1.0, 9.0).view(2, 2, 1, 2).requires_grad_()
    y = formula(HeadDropout("0", 0.5), z, torch.tensor([[1.0, 0.0], [0.0, 1.0]]).view(2, 2, 1, 1))
    assert torch.equal(y, torch.tensor([[[[2.0, 4.0]], [[0.0, 0.0]]], [[[0.0, 0.0]], [[14.0, 16.0]]]]))
    y.sum().backward()
    assert torch.equal(z.grad[:, :, 0], torch.tensor([[[2.0, 2.0], [0.0, 0.0]], [[0.0, 0.0], [2.0, 2.0]]]))


def test_the_joint_distribution_is_that_of_dropout_of_maps() -> None:
    """``nn.Dropout2d`` on [batch, heads, length, size] drops heads of examples, too: same values given the mask, same share."""
    p, z = 0.3, torch.rand(100, 12, 3, 2) + 1
    for y in (spliced(HeadDropout("0", p), z), nn.Dropout2d(p)(z)):
        mask = (y != 0).float()
        assert same_along(mask, (2, 3)) and not same_along(mask, (0,)) and not same_along(mask, (1,))
        torch.testing.assert_close(y, z * mask / (1 - p))
        assert abs(float(mask.mean()) - (1 - p)) < 5 * (p * (1 - p) / 1200) ** 0.5


def test_modes_and_strength_0() -> None:
    acts_in_train_mode_alone(HeadDropout("0", 0.5), torch.rand(4, 6, 3, 2) + 1)


def test_compiled() -> None:
    same_compiled(HeadDropout("0", 0.5), torch.randn(3, 4, 2, 2))


def test_errors() -> None:
    needs_a_rate(HeadDropout)
    fused = r"nn\.MultiheadAttention mixes its heads before it returns.*: replace it by an attention that calls F\.scaled_dot_product"
    sentence = rf"HeadDropout at 0: the value has shape \(2, 3, 8\); the splice takes .*{fused}"
    refuses_value(sentence, HeadDropout("0", 0.1), torch.ones(2, 3, 8))
    with pytest.raises(graphreg.NoMatchError, match=r"nn\.MultiheadAttention mixes its heads before it returns, so it has none\)"):
        graphreg.regularize(Fused(), head_dropout=0.1)
    with pytest.raises(graphreg.RegularizerError, match=rf"HeadDropout at attention: {fused}"):
        graphreg.regularize(Fused(), HeadDropout("attention", 0.1))
