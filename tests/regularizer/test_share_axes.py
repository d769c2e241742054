"""One draw along the axes that ``share_axes=`` names: which axes these are, and what does not fit."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphreg
from graphreg import Noise, RegularizerError, Splice
from graphreg.passes import BernoulliDropout, GaussianNoise
from graphreg.rng.noise import bits

KEY = torch.tensor([12345, 678], dtype=torch.int32)


class Layered(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.rnn, self.out = nn.LSTM(3, 4, **options), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h, (last, _) = self.rnn(x)
        return self.out(h) + self.out(last).sum()


def model() -> nn.Module:
    return nn.Sequential(nn.Identity(), nn.Tanh())


def noise_at(net: nn.Module, site: str, x: Tensor, axes: Any) -> Tensor:
    """The noise that is added at a site."""
    module = graphreg.regularize(net, GaussianNoise(site, 1.0, share_axes=axes), rng=0)
    seen: list[Tensor] = []
    rule = next(child for name, child in module.graphreg_rules.named_children() if name.endswith("_noise"))  # type: ignore[union-attr]
    rule.register_forward_hook(lambda m, a, out: seen.append(out - a[0]))
    module(x)
    return seen[0]


def shared(noise: Tensor) -> tuple[int, ...]:
    """The axes along which the noise does not vary."""
    return tuple(axis for axis in range(noise.dim()) if torch.allclose(noise, noise.narrow(axis, 0, 1).expand_as(noise), atol=1e-5))


@pytest.mark.parametrize(
    ("axes", "numbers"),
    [
        ((), ()), ("time", (1,)), ("batch", (0,)), (("time", "batch"), (0, 1)), (2, (2,)), (-1, (3,)), ((0, -1), (0, 3)),
        (["batch", 3], (0, 3)), ((0, 1, 2, 3), (0, 1, 2, 3)),
    ],
)  # fmt: skip
def test_axes_by_name_and_number(axes: Any, numbers: tuple[int, ...]) -> None:
    assert shared(noise_at(model(), "0", torch.zeros(2, 3, 4, 5), axes)) == numbers


@pytest.mark.parametrize(
    ("options", "site", "shape", "axes", "numbers"),
    [
        ({}, "rnn", (5, 2, 3), "time", (0,)), ({}, "rnn", (5, 2, 3), "batch", (1,)),
        ({"batch_first": True}, "rnn", (2, 5, 3), "time", (1,)), ({"batch_first": True}, "rnn", (2, 5, 3), "batch", (0,)),
        ({}, "rnn", (5, 3), "time", (0,)), ({"num_layers": 2}, "rnn:h_n", (5, 2, 3), "batch", (1,)),
    ],
)  # fmt: skip
def test_a_recurrent_layer_tells_its_axes(options: Any, site: str, shape: Any, axes: str, numbers: tuple[int, ...]) -> None:
    assert shared(noise_at(Layered(**options), site, torch.randn(shape), axes)) == numbers


def test_without_the_option_the_draw_is_that_of_0_1() -> None:
    z = torch.zeros(3, 4)
    assert torch.equal(Noise(KEY).keep(z, 0.5), Noise(KEY, ()).keep(z, 0.5, shared=()))
    expected = (bits(KEY, (3, 4)).long() % 2**32 >= 2**31).float()
    assert torch.equal(Noise(KEY).keep(z, 0.5), expected)


def test_a_shared_draw_is_that_of_a_value_of_length_1_there() -> None:
    """Of noise and of formula, of each kind; a draw that is shared takes the lanes of a draw, as any."""
    z, small = torch.zeros(3, 4, 5), torch.zeros(3, 1, 5)
    for draw in ("uniform", "normal"):
        first = getattr(Noise(KEY), draw)(small)
        assert torch.equal(getattr(Noise(KEY, (1,)), draw)(z), first)
        assert torch.equal(getattr(Noise(KEY), draw)(z, shared=[-2]), first)
    both = Noise(KEY, (1,))
    assert both.keep(z, 0.5, shared=(2,)).shape == (3, 1, 1)
    whole = Noise(KEY)
    whole.keep(z, 0.5)
    assert torch.equal(both.normal(z), whole.normal(small))


def test_dropout_scales_and_its_gradient_has_the_mask() -> None:
    x = torch.ones(4, 3, 8, requires_grad=True)
    module = graphreg.regularize(model(), BernoulliDropout("0", 0.75, share_axes="time"), rng=0)
    y = module(x).output
    y.sum().backward()
    kept = (y != 0).float()
    assert shared(kept) == (1,)
    torch.testing.assert_close(y, torch.tanh(4 * kept))
    torch.testing.assert_close(x.grad, 4 * kept * (1 - torch.tanh(torch.tensor(4.0)) ** 2))


@pytest.mark.parametrize("splice", [BernoulliDropout, GaussianNoise])
def test_compiled(splice: type[Splice]) -> None:
    """After an activation whose splice backward recomputes, and by names; two sizes of the batch."""
    net = nn.Sequential(nn.Linear(4, 4), nn.Sigmoid(), nn.Linear(4, 2))
    results = []
    for compiled in (False, True):
        module = graphreg.regularize(net, splice("1", 0.5, share_axes=("time", -1)), rng=0)
        run = torch.compile(module, backend="aot_eager", fullgraph=True) if compiled else module
        net.zero_grad()
        outputs = [run(torch.linspace(0, 1, 12 * n).view(n, 3, 4)).output for n in (2, 3, 5)]
        torch.cat(outputs).square().sum().backward()
        results.append([*outputs, *(p.grad.clone() for p in net.parameters() if p.grad is not None)])
    torch.testing.assert_close(results[0], results[1])


def test_under_vmap() -> None:
    """Rows that draw the same have the mask of a call without vmap; the axes are those of a row."""
    z = torch.zeros(2, 4, 5)
    for draw in ("uniform", "normal"):
        rows = torch.vmap(lambda row: getattr(Noise(KEY), draw)(row, shared=[0]), randomness="same")(z)  # noqa: B023
        assert rows.shape == (2, 1, 5) and torch.allclose(rows[0], getattr(Noise(KEY), draw)(z[0], shared=[0]))
    rows = torch.vmap(lambda row: Noise(KEY, (1,)).keep(row, 0.5), randomness="different")(torch.zeros(64, 4, 5))
    assert rows.shape == (64, 4, 1) and 0.3 < float(rows.float().mean()) < 0.7 and not torch.equal(rows[0], rows[1])


def test_a_users_splice_has_it_by_declaring_it() -> None:
    class Flip(Splice):
        share_axes: Any = ()

        def __call__(self, z: Tensor, weight: Tensor, noise: Noise) -> Tensor:
            return torch.where(noise.uniform(z) < weight, -z, z)

    y = graphreg.regularize(model(), Flip("0", 0.5, share_axes="batch"), rng=0)(torch.ones(3, 4, 5)).output
    assert shared(y) == (0,)


def test_the_report_has_the_option_where_it_is_given() -> None:
    options = [
        graphreg.report(graphreg.regularize(model(), splice)).regularizers[0].options
        for splice in (BernoulliDropout("0", 0.5), BernoulliDropout("0", 0.5, share_axes="time"))
    ]
    assert options == [{}, {"share_axes": ["time"]}]
    keyword = graphreg.from_kwargs(model(), dropout={"weight": 0.5, "share_axes": "time"})
    assert keyword == [BernoulliDropout("*", 0.5, share_axes=("time",), name="dropout")]


@pytest.mark.parametrize("axes", ["times", 1.0, True, None, ("time", None), {"time"}, [[1]]])
def test_what_is_no_axis(axes: Any) -> None:
    with pytest.raises(RegularizerError, match=r"GaussianNoise: share_axes=.* is not allowed; give 'time', 'batch', the number of an axis"):
        GaussianNoise("*", 0.1, share_axes=axes)


@pytest.mark.parametrize(
    ("net", "site", "x", "axes", "message"),
    [
        (model(), "0", torch.ones(2, 3), 2,
         "share_axes=2 is out of range for a value of shape (2, 3); an axis of it is a number from -2 to 1. Choose one, or leave the site"),
        (model(), "0", torch.ones(2, 3, 4), ("time", 1), "names axis 1 of a value of shape (2, 3, 4) twice. Name each axis once."),
        (model(), "0", torch.ones(2, 3), "time", "the value has shape (2, 3) and is no sequence: a sequence is [batch, time, units], "),
        (Layered(), "rnn", torch.ones(5, 3), "batch", "a value of shape (5, 4) from a recurrent layer has no batch axis. Give the layer a"),
    ],
)  # fmt: skip
def test_what_does_not_fit_the_value(net: nn.Module, site: str, x: Tensor, axes: Any, message: str) -> None:
    """It is refused when it is called, and, where the shape is known, when it is planned."""
    splice = GaussianNoise(site, 0.1, share_axes=axes)
    sentence = re.escape(f"GaussianNoise at {site}: ") + ".*" + re.escape(message)
    with pytest.raises(RegularizerError, match=sentence):
        graphreg.regularize(net, splice)(x)
    with pytest.raises(RegularizerError, match=sentence):
        graphreg.regularize(net, splice, example_inputs=x)


def test_what_has_no_time() -> None:
    channels = r"comes from a convolution \(0\), so its axis 1 is channels.*Give the number of the axis of time: share_axes=2\."
    with pytest.raises(RegularizerError, match=channels):
        graphreg.regularize(nn.Sequential(nn.Conv1d(2, 2, 1), nn.Tanh()), GaussianNoise("1", 0.1, share_axes="time"))
    with pytest.raises(RegularizerError, match=r"GaussianNoise at rnn:h_n: this is the state of rnn after the last step, no sequence"):
        graphreg.regularize(Layered(), GaussianNoise("rnn:h_n", 0.1, share_axes="time"))


def test_lengths_of_a_splice_need_their_option() -> None:
    with pytest.raises(RegularizerError, match=r"Unnamed: __call__ takes lengths if and only if the class has the option lengths"):

        class Unnamed(Splice):
            def __call__(self, z: Tensor, weight: Tensor, lengths: Tensor) -> Tensor:
                return z
