from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphreg
from graphreg.passes import LockedDropout
from spliced import acts_in_train_mode_alone, formula, needs_a_rate, refuses, refuses_value, same_along, same_compiled, spliced
from two_layers import text

Z = torch.ones(2, 3, 4)


class Layered(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.rnn, self.out = nn.GRU(3, 4, **options), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.rnn(x)[0])


def test_before_and_after() -> None:
    module = graphreg.regularize(Layered(), locked_dropout={"weight": 0.5, "pattern": "rnn"}, rng=0)
    assert (
        text(module.code)
        == """key = self.graphreg_rules.key()
rnn = self.rnn(x)
getitem = rnn[0]
rnn_locked_dropout = self.graphreg_rules.rnn_locked_dropout(getitem, key)
out = self.out(rnn_locked_dropout)
return graphreg_Regularized(out, {})"""
    )
    assert (
        text(graphreg.strip(module).code)
        == """rnn = self.rnn(x)
getitem = rnn[0]
out = self.out(getitem)
return out"""
    )


class Looped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.out = nn.GRUCell(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(x.shape[0], 4)
        for step in range(3):
            h = self.cell(x[:, step], h)
        return self.out(h)


@pytest.mark.parametrize("selector", ["cell", "cell_1"])
def test_the_calls_of_a_cell_cannot_share_a_mask(selector: str) -> None:
    """The error does not advise to select the calls of the cell, as it does for penalties: that is what was selected."""
    sentence = r"This is one call of 'cell'\. A splice acts on each call by itself, and the calls of a cell cannot share a draw\. Use a "
    with pytest.raises(graphreg.RegularizerError, match=sentence):
        graphreg.regularize(Looped(), LockedDropout(selector, 0.5), example_inputs=torch.ones(2, 3, 3))


def test_by_hand() -> None:
    """Two examples of three steps and two units: unit 1 of the first and unit 0 of the second are zero at every step."""
    z = torch.arange(12.0).view(2, 3, 2).requires_grad_()
    mask = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).view(2, 1, 2)
    y = formula(LockedDropout("0", 0.75), z, mask.expand(2, 3, 2))
    assert torch.equal(y, torch.tensor([[[0.0, 0.0], [8.0, 0.0], [16.0, 0.0]], [[0.0, 28.0], [0.0, 36.0], [0.0, 44.0]]]))
    y.sum().backward()
    assert torch.equal(z.grad, 4 * mask.expand(2, 3, 2))


def test_the_joint_distribution_is_that_of_dropout_of_whole_rows() -> None:
    """``F.dropout1d`` of [batch, units, time] has one draw for all of time, too: same values given the mask, same share that is kept."""
    p, z = 0.3, torch.rand(30, 5, 40) + 1
    ours, theirs = spliced(LockedDropout("0", p), z), F.dropout1d(z.transpose(1, 2), p).transpose(1, 2)
    for y in (ours, theirs):
        mask = (y != 0).float()
        assert same_along(mask, (1,)) and not same_along(mask, (0,)) and not same_along(mask, (2,))
        torch.testing.assert_close(y, z * mask / (1 - p))
        assert abs(float(mask.mean()) - (1 - p)) < 5 * (p * (1 - p) / 1200) ** 0.5


@pytest.mark.parametrize(("options", "axis"), [({}, 0), ({"batch_first": True}, 1)])
def test_the_layer_tells_its_axis_of_time(options: dict[str, Any], axis: int) -> None:
    module = graphreg.regularize(Layered(**options), LockedDropout("rnn", 0.5), rng=0)
    seen: list[Tensor] = []
    module.graphreg_rules.rnn_locked_dropout.register_forward_hook(lambda m, a, out: seen.append(out))  # type: ignore[union-attr]
    module(torch.randn(5, 6, 3))
    zero = seen[0] == 0
    assert same_along(zero, (axis,)) and not same_along(zero, (1 - axis,)) and 0 < zero.double().mean() < 1


class Language(nn.Module):
    """The values beside a layer have its order of axes."""

    def __init__(self, kind: str, batch_first: bool) -> None:
        super().__init__()
        self.embed, self.side, self.kind = nn.Embedding(10, 8), nn.Linear(8, 8), kind
        self.layer: Any = nn.LSTM(8, 8, batch_first=batch_first)
        if kind == "attention":
            self.layer = nn.MultiheadAttention(8, 2, batch_first=batch_first)
        elif kind == "transformer":
            self.layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=batch_first)
        self.batch_first = batch_first

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embed(ids)
        side = self.side(h).sigmoid()
        if self.kind == "packed":
            packed = nn.utils.rnn.pack_padded_sequence(h, torch.full((ids.shape[1 - self.batch_first],), 4), self.batch_first)
            y = nn.utils.rnn.pad_packed_sequence(self.layer(packed)[0], self.batch_first)[0]
        else:
            made = self.layer(h, h, h) if self.kind == "attention" else self.layer(h)
            y = made if self.kind == "transformer" else made[0]
        return y.exp() * side


@pytest.mark.parametrize("kind", ["lstm", "packed", "attention", "transformer"])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("knows_shapes", [False, True])
def test_values_beside_a_layer_have_its_axis_of_time(kind: str, batch_first: bool, knows_shapes: bool) -> None:
    model, ids = Language(kind, batch_first), torch.randint(10, (4, 4))
    inputs = {"example_inputs": ids} if knows_shapes else {}
    for site in ("embed", "sigmoid", "exp"):
        for options, axis in (({}, int(batch_first)), ({"time_axis": -2}, 1), ({"time_axis": -3}, 0)):
            locked = {"strength": 0.5, "pattern": site, **options}
            z = graphreg.regularize(model, locked_dropout=locked, keep={site: "spliced"}, rng=0, **inputs)(ids).values[site]
            assert same_along(z == 0, (axis,)) and not same_along(z == 0, (1 - axis,)), (site, options)


def test_another_axis_of_time() -> None:
    y = spliced(LockedDropout("0", 0.5, time_axis=2), torch.ones(3, 4, 5, 6))
    assert same_along(y, (2,)) and not any(same_along(y, (axis,)) for axis in (0, 1, 3))


def test_modes_and_strength_0() -> None:
    acts_in_train_mode_alone(LockedDropout("0", 0.5), torch.rand(4, 3, 8) + 1)


def test_compiled() -> None:
    same_compiled(LockedDropout("0", 0.5), torch.randn(3, 4, 8))


def test_errors() -> None:
    needs_a_rate(LockedDropout)
    refuses(r"LockedDropout: time_axis='1' is not allowed; give the axis of time", LockedDropout, "0", 0.1, time_axis="1")
    sentence = r"LockedDropout at 0: the value has shape \(4, 3\) and is no sequence: a sequence is \[batch, time, units\], 3 dims or more"
    refuses_value(sentence, LockedDropout("0", 0.5), torch.ones(4, 3))
    refuses_value(r"time_axis=3 is out of range for a value of shape \(2, 3, 4\)", LockedDropout("0", 0.5, time_axis=3), Z)
    with pytest.raises(graphreg.RegularizerError, match=r"LockedDropout at rnn:h_n: this is the state of rnn after the last step"):
        graphreg.regularize(Reading(), LockedDropout("rnn:h_n", 0.5))
    with pytest.raises(graphreg.RegularizerError, match=r"comes from a convolution \(0\), so its axis 1 is channels.* Give time_axis=2"):
        graphreg.regularize(nn.Sequential(nn.Conv1d(2, 2, 1), nn.Tanh()), LockedDropout("0", 0.5))


class Reading(Layered):
    """Reads the state after the last step."""

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.rnn(x)[1])
