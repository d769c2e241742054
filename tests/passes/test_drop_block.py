from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import drop_block2d

import graphreg
from graphreg.passes import DropBlock
from spliced import acts_in_train_mode_alone, formula, needs_a_rate, refuses, refuses_value, same_along, same_compiled, spliced
from two_layers import text


class ChannelsLast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.act, self.b = nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.act(self.a(x).permute(0, 2, 3, 1)))


class Pooled(nn.Module):
    """A map that a convolution reads, and a global average, which is hidden too but no map."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.pool, self.out = nn.Conv2d(1, 2, 3), nn.Conv2d(2, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.pool(self.b(F.relu(self.a(x)))).flatten(1))


def test_before_and_after() -> None:
    module = graphreg.regularize(Pooled(), drop_block={"weight": 0.1, "block_size": 3}, rng=0)
    assert (
        text(module.code)
        == """key = self.graphreg_rules.key()
a = self.a(x)
relu = torch.nn.functional.relu(a, inplace = False)
relu_drop_block = self.graphreg_rules.relu_drop_block(relu, key)
b = self.b(relu_drop_block)
pool = self.pool(b)
flatten = pool.flatten(1)
out = self.out(flatten)
return graphreg_Regularized(out, {})"""
    )
    assert "drop_block" not in graphreg.strip(module).code


def test_by_hand() -> None:
    """On a 3 x 3 map a 2 x 2 block may begin at 2 x 2 places; it begins at (0, 1), so 4 of 9 elements go and the rest is 9/5 of itself."""
    z = torch.arange(1.0, 10.0).view(1, 1, 3, 3).requires_grad_()
    y = formula(DropBlock("0", 0.3, block_size=2), z, torch.tensor([[1.0, 0.0], [1.0, 1.0]]).view(1, 1, 2, 2))
    expected = torch.tensor([[1.0, 0.0, 0.0], [4.0, 0.0, 0.0], [7.0, 8.0, 9.0]])
    torch.testing.assert_close(y[0, 0], expected * 9 / 5)
    y.sum().backward()
    torch.testing.assert_close(z.grad[0, 0], (expected != 0) * torch.tensor(9 / 5))


@pytest.mark.parametrize("size", [1, 3, 7])
def test_the_formula_is_torchvisions_given_the_blocks(size: int) -> None:
    """Torchvision draws where blocks begin as here, for an odd size at the same places."""
    z, p = torch.linspace(-1, 1, 2 * 3 * 9 * 8).view(2, 3, 9, 8), 0.3
    shape = (9 - size + 1, 8 - size + 1)
    torch.manual_seed(0)
    begins = torch.empty(2, 3, *shape).bernoulli_(p * 72 / (size**2 * shape[0] * shape[1]))
    torch.manual_seed(0)
    torch.testing.assert_close(formula(DropBlock("0", p, block_size=size), z, 1 - begins), drop_block2d(z, p, size))


P, SIZE, ONES = 0.2, 5, torch.ones(8, 16, 14, 14)


def blocks_are_whole(zero: Tensor, outside: float) -> None:
    """What is zero is a union of whole blocks, one draw a channel; where ``outside`` is 1, blocks may reach over the edge.

    Away from the edge an element is zero unless none of the blocks that cover it begins: with probability 1 - (1 - gamma)^25.
    """
    chance = 1 - (1 - P * 14**2 / (SIZE**2 * 10**2)) ** SIZE**2
    assert abs(float(zero[..., 4:-4, 4:-4].mean()) - chance) < 0.04
    whole = -F.max_pool2d(-F.pad(zero, [SIZE - 1] * 4, value=outside), SIZE, stride=1)  # 1 where a whole block is zero
    assert torch.equal(F.max_pool2d(whole, SIZE, stride=1), zero)
    assert not same_along(zero, (0,)) and not same_along(zero, (1,))


def test_shapes_of_blocks_and_the_share_that_is_kept() -> None:
    torch.manual_seed(0)
    ours, torchvisions = ((y == 0).float() for y in (spliced(DropBlock("0", P, block_size=SIZE), ONES), drop_block2d(ONES, P, SIZE)))
    blocks_are_whole(ours, 0.0)
    blocks_are_whole(torchvisions, 0.0)
    assert abs(float(ours.mean() - torchvisions.mean())) < 0.03 and 1 - P < 1 - float(ours.mean()) < 1 - P / 2


def test_blocks_are_those_of_timm() -> None:
    from timm.layers import drop  # noqa: PLC0415  (it takes seconds)

    torch.manual_seed(0)
    blocks_are_whole((drop.drop_block_2d(ONES, P, SIZE, couple_channels=False) == 0).float(), 1.0)


def test_a_value_without_a_kept_element_is_zero() -> None:
    z = torch.ones(1, 1, 2, 2)
    assert torch.equal(formula(DropBlock("0", 0.9, block_size=2), z, torch.zeros(1, 1, 1, 1)), torch.zeros_like(z))


def test_modes_and_strength_0() -> None:
    acts_in_train_mode_alone(DropBlock("0", 0.2, block_size=3), torch.rand(2, 4, 8, 8) + 1)


def test_compiled() -> None:
    same_compiled(DropBlock("0", 0.2), torch.randn(2, 4, 8, 9))


def test_errors() -> None:
    needs_a_rate(DropBlock)
    for size in (0, 2.0, True):
        refuses(rf"DropBlock: block_size={size} is not allowed; block_size must be a whole number, 1 or more", DropBlock, "0", 0.1,
                block_size=size)  # fmt: skip
    refuses_value(r"DropBlock at 0: the value has shape \(2, 3, 8\); the splice takes maps", DropBlock("0", 0.1), torch.ones(2, 3, 8))
    sentence = r"\(2, 3, 9, 5\); block_size=7 is larger than the map\. Give block_size=5 or less, or leave the site out\."
    refuses_value(sentence, DropBlock("0", 0.1), torch.ones(2, 3, 9, 5))
    with pytest.raises(graphreg.NoMatchError, match=r"\(the hidden values that are maps of a 2d convolution\)"):
        graphreg.regularize(nn.Sequential(nn.Conv1d(2, 2, 1), nn.ReLU(), nn.Conv1d(2, 2, 1)), drop_block=0.1)
    sentence = r"takes \[batch, channels, height, width\], and the channels of the convolution are axis 3 here\. Select a value where they"
    with pytest.raises(graphreg.RegularizerError, match=sentence):
        graphreg.regularize(ChannelsLast(), DropBlock("act", 0.1, block_size=2), example_inputs=torch.randn(2, 2, 6, 6))


def test_in_a_row_it_warns() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.ReLU())
    with pytest.warns(UserWarning, match=r"acts 2 times in a row on one value \(0, 1\D.*: 0\.81 of it is kept, not 0\.9"):
        graphreg.regularize(model, DropBlock(["0", "1"], 0.1))
