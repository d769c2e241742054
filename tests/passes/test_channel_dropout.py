from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphreg
from graphreg.passes import ChannelDropout
from spliced import acts_in_train_mode_alone, formula, needs_a_rate, refuses_value, same_along, same_compiled, spliced
from two_layers import text

Z = torch.arange(24.0).view(2, 3, 2, 2) + 1


class ChannelsLast(nn.Module):
    """A layer of ConvNeXt: between the convolutions, the channels are the last axis."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.mlp, self.act, self.b = nn.Conv2d(2, 3, 3), nn.Linear(3, 5), nn.GELU(), nn.Conv2d(5, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.act(self.mlp(self.a(x).permute(0, 2, 3, 1))).permute(0, 3, 1, 2))


class Small(nn.Module):
    """Two convolutions, then a head of two layers: the hidden value of the head has no axes of a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head, self.out = nn.Conv2d(1, 2, 3), nn.Conv2d(2, 4, 3), nn.Linear(4, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.b(F.relu(self.a(x)))
        return self.out(F.relu(self.head(maps.mean((2, 3)))))


def test_before_and_after() -> None:
    model = Small()
    module = graphreg.regularize(model, channel_dropout=0.5, rng=0)
    assert (
        text(module.code)
        == """key = self.graphreg_rules.key()
a = self.a(x)
relu = torch.nn.functional.relu(a, inplace = False)
relu_channel_dropout = self.graphreg_rules.relu_channel_dropout(relu, key)
b = self.b(relu_channel_dropout)
mean = b.mean((2, 3))
head = self.head(mean)
relu_1 = torch.nn.functional.relu(head, inplace = False)
out = self.out(relu_1)
return graphreg_Regularized(out, {})"""
    )
    before = text(graphreg.trace(model).graphs["both"].python_code("self").src)
    assert text(graphreg.strip(module).code) == before and "dropout" not in before


def test_by_hand() -> None:
    """Channels 0 and 2 of the first example and 1 of the second are kept, at 1/(1 - 0.5) = 2 times their value; the gradient, too."""
    mask = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]]).view(2, 3, 1, 1)
    z = Z.clone().requires_grad_()
    y = formula(ChannelDropout("0", 0.5), z, mask)
    assert torch.equal(y[0, :, 0, 0], torch.tensor([2.0, 0.0, 18.0])) and torch.equal(y[1, :, 1, 1], torch.tensor([0.0, 40.0, 0.0]))
    y.sum().backward()
    assert torch.equal(z.grad, 2 * mask.expand_as(Z))


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_the_formula_is_torchs_given_the_mask(dims: int) -> None:
    function = (F.dropout1d, F.dropout2d, F.dropout3d)[dims - 1]
    z = torch.linspace(-1, 1, 4 * 6 * 2**dims).view(4, 6, *[2] * dims)
    theirs = []
    for value in (torch.ones_like(z), z):
        torch.manual_seed(0)
        theirs.append(function(value, 0.3))
    mask = (theirs[0] != 0).float()[(..., *[slice(0, 1)] * dims)]
    torch.testing.assert_close(formula(ChannelDropout("0", 0.3), z, mask), theirs[1])


def test_what_shares_a_draw_and_the_share_that_is_kept() -> None:
    """As in nn.Dropout2d: a channel of an example is one draw, and channels and examples are independent."""
    p, ones = 0.25, torch.ones(40, 50, 2, 3)
    for y in (spliced(ChannelDropout("0", p), ones), nn.Dropout2d(p)(ones)):
        assert same_along(y, (2, 3)) and not same_along(y, (0,)) and not same_along(y, (1,))
        kept = (y[:, :, 0, 0] != 0).double()
        assert abs(float(kept.mean()) - (1 - p)) < 5 * (p * (1 - p) / 2000) ** 0.5
        assert 0.1 < float(kept.mean(0).std()) / (p * (1 - p) / 40) ** 0.5 < 2  # over examples


def test_modes_and_strength_0() -> None:
    acts_in_train_mode_alone(ChannelDropout("0", 0.5), torch.rand(4, 8, 2) + 1)


def test_compiled() -> None:
    same_compiled(ChannelDropout("0", 0.5), torch.randn(3, 8, 2, 2))


def test_errors() -> None:
    needs_a_rate(ChannelDropout)
    takes = r"the splice takes \[batch, channels, \.\.\.\], 3 dims or more.*BernoulliDropout"
    sentence = rf"ChannelDropout at 0: the value has shape \(4, 3\); {takes}"
    refuses_value(sentence, ChannelDropout("0", 0.5), torch.ones(4, 3))
    with pytest.raises(graphreg.NoMatchError, match=r"\(the hidden values that have the axes of a convolution's output\)"):
        graphreg.regularize(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)), channel_dropout=0.1)
    with pytest.warns(UserWarning, match=r"acts 2 times in a row on one value \(0, 1\D.*: 0\.25 of it is kept, not 0\.5"):
        graphreg.regularize(nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.ReLU()), ChannelDropout(["0", "1"], 0.5))
    x = torch.randn(4, 2, 6, 6)
    sentence = (
        r"ChannelDropout at act: the splice takes axis 1 for the channels, and the channels of the convolution are axis 3 here\. "
        r"Use BernoulliDropout with share_axes=\(1, 2\), which drops whole channels of this value\."
    )
    with pytest.raises(graphreg.RegularizerError, match=sentence):
        graphreg.regularize(ChannelsLast(), ChannelDropout("act", 0.5), example_inputs=x)
    by_channel = {"pattern": "act", "strength": 0.5, "share_axes": (1, 2)}
    z = graphreg.regularize(ChannelsLast(), dropout=by_channel, example_inputs=x, keep="act", rng=0)(x).values["act"]
    assert same_along(z == 0, (1, 2)) and not same_along(z == 0, (3,))
    plan = graphreg.plan(graphreg.trace(ChannelsLast(), x), [ChannelDropout("*", 0.5)])
    assert [edit.site.name for edit in plan.edits] == ["a"]
    # nothing is known of the channels that Linear makes
    graphreg.regularize(nn.Sequential(nn.Linear(2, 3), nn.ReLU()), ChannelDropout("0", 0.5), example_inputs=torch.randn(4, 5, 2))
