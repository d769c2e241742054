from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.convnext import CNBlock
from torchvision.ops import stochastic_depth

import graphreg
from graphreg.passes import DropPath
from spliced import acts_in_train_mode_alone, formula, needs_a_rate, refuses, refuses_value, same_along, same_compiled, spliced
from two_layers import text


class Blocks(nn.Module):
    """Two blocks, of which the second has a projected shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.short = nn.Linear(4, 4), nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.a(x)
        return self.short(x) + self.c(self.b(x).relu())


def test_before_and_after() -> None:
    model = Blocks()
    module = graphreg.regularize(model, stochastic_depth=0.5, rng=0)
    assert (
        text(module.code)
        == """key = self.graphreg_rules.key()
a = self.a(x)
a_stochastic_depth = self.graphreg_rules.a_stochastic_depth(a, key)
add = x + a_stochastic_depth
short = self.short(add)
b = self.b(add)
relu = b.relu()
c = self.c(relu)
c_stochastic_depth = self.graphreg_rules.c_stochastic_depth(c, key)
add_1 = short + c_stochastic_depth
return graphreg_Regularized(add_1, {})"""
    )
    before = text(graphreg.trace(model).graphs["both"].python_code("self").src)
    assert text(graphreg.strip(module).code) == before and "depth" not in before


def test_by_hand() -> None:
    """The second of three examples is dropped; the others are scaled by 1/(1 - 0.5) = 2, and so are their gradients."""
    z = torch.arange(1.0, 7.0).view(3, 2).requires_grad_()
    y = formula(DropPath("0", 0.5), z, torch.tensor([[1.0], [0.0], [1.0]]))
    assert torch.equal(y, torch.tensor([[2.0, 4.0], [0.0, 0.0], [10.0, 12.0]]))
    y.sum().backward()
    assert torch.equal(z.grad, torch.tensor([[2.0, 2.0], [0.0, 0.0], [2.0, 2.0]]))
    y = formula(DropPath("0", 0.5, batch_axis=-1), z, torch.tensor([[1.0, 0.0]]))
    assert torch.equal(y, torch.tensor([[2.0, 0.0], [6.0, 0.0], [10.0, 0.0]]))


def test_where_torchvisions_own_is_written_into() -> None:
    """Its blocks add in place to what their stochastic depth returns, which may be what it got."""
    model = nn.Sequential(CNBlock(4, 1.0, 0.0), CNBlock(4, 1.0, 0.0))
    x = torch.randn(6, 4, 5, 5)
    module = graphreg.regularize(model, drop_path=0.5, rng=0)
    graphreg.verify(model, module, x)
    with torch.no_grad():
        output, plain = module(x).output, model(x)
    kept = [torch.equal(mine, theirs) for mine, theirs in zip(output, plain, strict=True)]
    assert not any(kept)  # a kept branch is scaled by 2
    assert any(torch.equal(mine, theirs) for mine, theirs in zip(output, x, strict=True))  # both branches of an example are dropped
    module(x).output.sum().backward()


def test_it_is_torchvisions_given_the_mask() -> None:
    z, p = torch.rand(40, 3, 2) + 1, 0.3
    theirs = stochastic_depth(z, p, "row")
    mask = (theirs != 0).float()[:, :1, :1]
    assert same_along(theirs != 0, (1, 2)) and 0 < float(mask.mean()) < 1
    torch.testing.assert_close(formula(DropPath("0", p), z, mask), theirs)


def test_it_is_timms_given_the_mask() -> None:
    from timm.layers import drop  # noqa: PLC0415  (it takes seconds)

    z, p = torch.rand(40, 3, 2) + 1, 0.3
    theirs = drop.drop_path(z, p, training=True)
    mask = (theirs != 0).float()[:, :1, :1]
    assert same_along(theirs != 0, (1, 2)) and 0 < float(mask.mean()) < 1
    torch.testing.assert_close(formula(DropPath("0", p), z, mask), theirs)


def test_the_joint_distribution() -> None:
    """One draw an example, along whichever axis the examples are, with the share that the weight says; examples are independent."""
    p, z = 0.3, torch.rand(4000, 3, 2) + 1
    for y, axes in ((spliced(DropPath("0", p), z), (1, 2)), (spliced(DropPath("0", p, batch_axis=1), z.transpose(0, 1)), (0, 2))):
        mask = (y != 0).float()
        assert same_along(mask, axes)
        each = mask.amax(axes)
        assert abs(float(each.mean()) - (1 - p)) < 5 * (p * (1 - p) / 4000) ** 0.5
        assert abs(float((each[1:] * each[:-1]).mean()) - (1 - p) ** 2) < 5 * 0.5 / 4000**0.5


def test_the_residual_sum_is_its_trunk_where_the_branch_is_dropped() -> None:
    model, x = Blocks(), torch.randn(64, 4)
    module = graphreg.regularize(model, DropPath("a", 0.5), rng=1)
    with torch.no_grad():
        left = model.short(x) + model.c(model.b(x).relu())  # where x + a(x) is x alone
        kept = model.short(x + 2 * model.a(x)) + model.c(model.b(x + 2 * model.a(x)).relu())
        y = module(x).output
    dropped = torch.isclose(y, left, atol=1e-5).all(1)
    assert 16 < int(dropped.sum()) < 48
    torch.testing.assert_close(y, torch.where(dropped[:, None], left, kept))


class Recommender(nn.Module):
    """As SASRec: attention of [time, batch, units] between layers of [batch, time, units]."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attend = nn.LayerNorm(4), nn.MultiheadAttention(4, 2)
        self.mix = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        h = self.norm(x)
        h = (h + self.attend(h, x, x)[0]).transpose(0, 1)
        y: Tensor = h + self.mix(h)
        return y


@pytest.mark.parametrize("example", [None, torch.randn(3, 5, 4)])
def test_steps_are_not_taken_for_examples(example: Tensor | None) -> None:
    model, x = Recommender(), torch.randn(30, 5, 4)
    told = r"DropPath at attend: axis 0 of this value is time, because a layer of \[time, batch, \.\.\.\] reads it or has made it, .*=-3\."
    with pytest.raises(graphreg.RegularizerError, match=told):
        graphreg.regularize(model, drop_path=0.5, example_inputs=example)
    strengths: dict[str, Any] = {"attend": {"strength": 0.5, "batch_axis": 1}, "mix": 0.5}
    keep: Any = {"attend": "spliced", "mix": "spliced"}
    module = graphreg.regularize(model, drop_path=strengths, keep=keep, rng=0, example_inputs=example)
    values = module(x).values
    for name, axis in (("attend", 1), ("mix", 0)):
        dropped = (values[name] == 0).transpose(0, axis).flatten(1)
        assert 0 < int(dropped.all(1).sum()) == int(dropped.any(1).sum()) < 30
    with pytest.raises(graphreg.RegularizerError, match="DropPath at mix.2: axis 1 of this value is time, .* Give options by site"):
        graphreg.regularize(model, drop_path={"strength": 0.5, "batch_axis": 1}, example_inputs=example)
    map_net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU())
    with pytest.raises(graphreg.RegularizerError, match="DropPath at 1: axis 1 of this value is channels, and batch_axis=1 would"):
        graphreg.regularize(map_net, DropPath("1", 0.5, batch_axis=1))
    layer = nn.TransformerEncoderLayer(4, 2, 8)
    with pytest.raises(graphreg.RegularizerError, match="DropPath at dropout1: axis 0 of this value is time"):
        graphreg.regularize(layer, drop_path=0.5, example_inputs=x)
    assert len(graphreg.report(graphreg.regularize(layer, drop_path={"strength": 0.5, "batch_axis": 1}, example_inputs=x)).sites) == 2

    class Last(nn.Module):
        """A value of [batch, units] has no steps."""

        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.linear = nn.GRU(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            h = self.rnn(x)[0][-1]
            y: Tensor = h + self.linear(h)
            return y

    assert graphreg.report(graphreg.regularize(Last(), drop_path=0.5, example_inputs=x)).regularizers[0].sites == ("linear",)

    class Viewed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.linear = nn.GRU(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            h = self.rnn(x)[0].reshape(-1, 4).view(5, -1, 4)
            y: Tensor = h + self.linear(h)
            return y

    with pytest.raises(graphreg.RegularizerError, match="not known which axis has the examples. .*: batch_axis=-3 if .* batch_axis=-2 if"):
        graphreg.regularize(Viewed(), drop_path=0.5, example_inputs=x)
    for axis in (-3, -2):
        graphreg.regularize(Viewed(), drop_path={"strength": 0.5, "batch_axis": axis}, example_inputs=x)


def test_modes_and_strength_0() -> None:
    acts_in_train_mode_alone(DropPath("0", 0.5), torch.rand(40, 3) + 1)


def test_compiled() -> None:
    same_compiled(DropPath("0", 0.5), torch.randn(6, 4, 2))


def test_errors() -> None:
    needs_a_rate(DropPath)
    refuses(r"DropPath: batch_axis='0' is not allowed; batch_axis must be the number of an axis", DropPath, "0", 0.1, batch_axis="0")
    far = r"DropPath at 0: the value has shape \(2, 3\); batch_axis=2 is not an axis of the value\. Give the number of the axis of examples"
    refuses_value(far, DropPath("0", 0.1, batch_axis=2), torch.ones(2, 3))
    none = r"Sequential has none of the default sites of DropPath \(the residual branches, \*\*#branch\)\. Name a value by a selector"
    with pytest.raises(graphreg.NoMatchError, match=none):
        graphreg.regularize(nn.Sequential(nn.Linear(2, 2)), drop_path=0.1)
    twice = r"drop_path acts 2 times in a row on one value \(0, 1, .*: 0\.25 of it is kept, not 0\.5"
    with pytest.warns(UserWarning, match=twice):
        graphreg.regularize(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1)), DropPath("*[01]", 0.5))
