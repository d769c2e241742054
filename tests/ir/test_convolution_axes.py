"""Which operations leave the axes of a convolution's output as they are, and which give the value axes of its own."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.nn.modules import activation

import graphreg

Way = Callable[[Tensor], Tensor]


class After(nn.Module):
    def __init__(self, way: Way) -> None:
        super().__init__()
        self.conv, self.way = nn.Conv2d(3, 8, 3, padding=1), way

    def forward(self, x: Tensor) -> Tensor:
        return torch.mul(self.way(self.conv(x)), 1.0)


def spatial(way: Way) -> int:
    sites = {site.name: site.spatial for site in graphreg.trace(After(way), example_inputs=torch.randn(2, 3, 6, 6)).values}
    return sites[[name for name in sites if name.startswith("mul")][-1]]


def gated(h: Tensor) -> Tensor:
    a, b = h.chunk(2, 1)
    return a * torch.sigmoid(b)


def written(h: Tensor) -> Tensor:
    h = h.clone()
    h[:, 0] = 0
    return h


KEPT: dict[str, Way] = {
    "chunk": gated, "split": lambda h: h.split(4, 1)[0], "written": written, "pad": lambda h: F.pad(h, (1, 1, 0, 0)),
    "flip": lambda h: h.flip(-1), "roll": lambda h: h.roll(1, 3), "normalize": lambda h: F.normalize(h, dim=1),
    "mean": lambda h: h.mean((2, 3), keepdim=True), "sum": lambda h: h.sum((2, 3), True),
    "global response": lambda h: h / (h.norm(dim=(2, 3), keepdim=True) + 1e-6),
    "shuffle": lambda h: F.pixel_shuffle(h, 2), "channels": lambda h: F.channel_shuffle(h, 2),
    "interpolate": lambda h: F.interpolate(h, (3, 3)),
    "twice": lambda h: h.repeat_interleave(2, 3), "bfloat16": lambda h: h.bfloat16().float(), "detach": lambda h: h.detach() + h,
    "prelu": lambda h: F.prelu(h, torch.ones(1)),
    "slice": lambda h: h[:, ::2], "cat": lambda h: torch.cat([h, h], 1), "where": lambda h: torch.where(h > 0, h, 0.0),
}  # fmt: skip


def channels_last(h: Tensor) -> Tensor:
    """As in ConvNeXt: the channels are computed anew by a Linear, and are axis 1 again."""
    return F.linear(F.layer_norm(h.permute(0, 2, 3, 1), (8,)), torch.ones(5, 8)).permute(0, 3, 1, 2)


def shuffled(h: Tensor) -> Tensor:
    """As in ShuffleNet."""
    batch, channels, *size = h.shape
    return h.view(batch, 2, channels // 2, *size).transpose(1, 2).contiguous().view(batch, -1, *size)


def tokens(h: Tensor) -> Tensor:
    """As in a Mixer: tokens, whose channels are last, and in which a Linear mixes the places."""
    h = h.flatten(2).transpose(1, 2)
    return h + F.linear(h.transpose(1, 2), torch.ones(36, 36)).transpose(1, 2)


# where the channels are, counted by the axes behind them
MOVED: dict[str, tuple[Way, int]] = {
    "Flatten": (nn.Flatten(2), 1), "Unflatten": (nn.Unflatten(2, (3, 2)), 3), "einops": (lambda h: rearrange(h, "b c h w -> b c (h w)"), 1),
    "flatten": (lambda h: h.flatten(2), 1), "reshape": (lambda h: h.reshape(*h.shape[:2], -1), 1), "mean": (lambda h: h.mean(2), 1),
    "item": (lambda h: h[0], 2), "unsqueeze": (lambda h: h[:, None], 2), "stack": (lambda h: torch.stack([h, h]), 2),
    "transpose": (lambda h: h.transpose(1, 2), 1), "index": (lambda h: h[..., 0], 1), "fft": (lambda h: torch.fft.fft2(h).real, 2),
    "channels last": (channels_last, 2), "shuffled": (shuffled, 2), "maps of tokens": (lambda h: tokens(h).mT.view(h.shape), 2),
    "excitation": (lambda h: h * F.linear(h.mean((2, 3)), torch.ones(8, 8))[:, :, None, None], 2),
    "one group": (lambda h: h.reshape(2, 1, *h.shape[1:]), 2), "one step": (lambda h: h.view(2, 1, 8, 36), 1),
    "squeeze": (lambda h: h.mean(2, keepdim=True).squeeze(2), 1), "nothing to squeeze": (lambda h: h.squeeze(), 2),
    "broadcast": (lambda h: torch.ones(3, 1, 8, 6, 6) * h, 2), "attention to places": (lambda h: h.amax(1, keepdim=True) * h, 2),
    "largest": (lambda h: h + h.max(), 2), "max": (lambda h: h.max(-1)[0], 1), "smallest": (lambda h: h.min(2).values, 1),
    "sum of several": (lambda h: torch.stack([h, h * h], 1).sum(1), 2), "selected": (lambda h: h.index_select(1, torch.arange(3)), 2),
    "pooled": (lambda h: F.max_pool2d(h, 2, return_indices=True)[0], 2), "sort": (lambda h: h.sort(2)[0], 2),
    "unpooled": (lambda h: F.max_unpool2d(*F.max_pool2d(h, 2, return_indices=True), 2), 2),
    "a layer unpools": (lambda h: nn.MaxUnpool2d(2)(*nn.MaxPool2d(2, return_indices=True)(h)), 2),
    "stacked": (lambda h: torch.hstack([h, h]), 2), "repeated": (lambda h: h.repeat_interleave(2, 1), 2),
    "scatter": (lambda h: h.scatter(1, torch.zeros(2, 1, 6, 6, dtype=torch.long), 0.0), 2),
    "filled": (lambda h: h.index_fill(1, torch.tensor([0]), 0.0), 2), "unbound": (lambda h: h.unbind(2)[0], 1),
    "largest channels": (lambda h: h.topk(2, 1).values, 2), "maxout": (lambda h: h.view(2, 4, 2, 6, 6).amax(2), 2),
    "radix": (lambda h: h.view(2, 2, 4, 6, 6).sum(1).mean((2, 3), keepdim=True), 2),
    "normed after attention": (lambda h: F.batch_norm(h.mT @ h, torch.zeros(8), torch.ones(8)), 2),
    "normed by a function": (lambda h: F.group_norm((h.flatten(2).mT @ h.flatten(2)), 2), 1),
    "excitation alone": (lambda h: F.linear(h.mean((2, 3)), torch.ones(8, 8)).view(2, 8, 1, 1), 2),
}  # fmt: skip
OTHERS: dict[str, Way] = {
    "permute": lambda h: h.permute(0, 2, 3, 1), "transpose": lambda h: h.transpose(1, 3), "mean": lambda h: h.mean(1), "tokens": tokens,
    "linear": lambda h: F.linear(h, torch.ones(5, 6)), "unbind": lambda h: h.unbind(1)[0], "all in one": lambda h: h.flatten(1),
    "sorted": lambda h: h.flatten(1).topk(2)[0],
    "all is squeezed": lambda h: h.mean((2, 3), keepdim=True).squeeze(), "one channel": lambda h: h[:, :1].squeeze(1),
    "groups": lambda h: h.view(2, 2, 4, 6, 6), "merged": lambda h: h.view(2, 2, 24, 6),
    "gate": lambda h: torch.ones(2, 5, 6, 6) * h.mean(1, keepdim=True),
}  # fmt: skip


@pytest.mark.parametrize("way", KEPT.values(), ids=KEPT)
def test_axes_that_stay(way: Way) -> None:
    assert spatial(way) == 2


@pytest.mark.parametrize(("way", "behind"), MOVED.values(), ids=MOVED)
def test_channels_that_move(way: Way, behind: int) -> None:
    assert spatial(way) == behind


@pytest.mark.parametrize("way", OTHERS.values(), ids=OTHERS)
def test_axes_of_its_own(way: Way) -> None:
    assert spatial(way) == 0


def test_each_activation_of_torch_as_a_layer_and_as_a_function() -> None:
    """The functions are those that torch's own layers call, so none can be forgotten."""
    needed: dict[str, Any] = {"Threshold": (0.1, 0.0), "Softmin": (1,), "Softmax": (1,), "LogSoftmax": (1,), "GLU": (1,)}
    kinds = {
        name: kind for name, kind in inspect.getmembers(activation, inspect.isclass)
        if issubclass(kind, nn.Module) and kind.__module__ == activation.__name__ and name != "MultiheadAttention"
    }  # fmt: skip
    assert len(kinds) > 25
    for name, kind in kinds.items():
        layer = kind(*needed.get(name, ()))
        assert spatial(layer) == 2, name
        if name != "PReLU":  # the function is in ``KEPT``, since it takes the layer's parameter
            assert spatial(lambda h, layer=layer: type(layer).forward(layer, h)) == 2, name


def test_decov_behind_a_function_is_decov_behind_the_layer() -> None:
    """Worked out by hand: the units are the channels."""
    x = torch.randn(2, 3, 6, 6)
    module = graphreg.regularize(After(F.hardswish), decov={"hardswish": 1.0}, example_inputs=x)
    h = F.hardswish(module.get_submodule("conv")(x)).movedim(1, -1).flatten(0, -2)
    covariance = (h - h.mean(0)).T @ (h - h.mean(0)) / len(h)
    expected = (covariance - covariance.diag().diag()).square().sum() / 2
    torch.testing.assert_close(module(x).penalties["decov"], expected)


class Flipped(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.contiguous().flip(-1).double().float()


class Before(nn.Module):
    """A value of [batch, time, units] that goes to a convolution by a ``way``."""

    def __init__(self, way: Way, conv: nn.Module, after: nn.Module | None = None) -> None:
        super().__init__()
        self.lin, self.norm, self.conv, self.way, self.after = nn.Linear(4, 6), nn.LayerNorm(6), conv, way, after or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.after(torch.mul(self.way(self.norm(self.lin(x))), 1.0)))


AFTER: dict[str, nn.Module] = {"nothing": nn.Identity(), "norm": nn.BatchNorm1d(6), "flip": Flipped(), "groups": nn.GroupNorm(2, 6)}


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("after", AFTER)
def test_what_a_convolution_reads_has_its_axes_before_other_operations(after: str, known: bool) -> None:
    model = Before(lambda h: h.transpose(1, 2), nn.Conv1d(6, 5, 1), AFTER[after])
    (site,) = (site for site in graphreg.trace(model, torch.randn(2, 7, 4) if known else None).values if site.name == "mul")
    assert site.is_map and site.channels == (1 if known else None)


@pytest.mark.parametrize(
    ("way", "conv", "axis"),
    [
        (lambda h: h.transpose(1, 2), nn.Conv1d(6, 5, 1), 1),  # as in a Conformer
        (lambda h: h.transpose(1, 2).relu(), nn.Conv1d(6, 5, 1), 1),
        (lambda h: h.view(2, 6, 1, 7), nn.Conv2d(6, 5, 1), 1),  # as in a generator
        (lambda h: h, nn.Conv1d(7, 7, 1), None),  # it mixes positions, as in gMLP: the units are those of the layer before
        (lambda h: h.relu(), nn.Conv1d(7, 7, 1), None),
    ],
)
def test_what_a_convolution_reads_has_its_axes(way: Way, conv: nn.Module, axis: int | None) -> None:
    torch.manual_seed(0)
    model, x = Before(way, conv), torch.randn(2, 7, 4)
    (site,) = (site for site in graphreg.trace(model, example_inputs=x).values if site.name == "mul")
    assert (site.channels, site.is_map) == (axis, axis is not None)
    module = graphreg.regularize(model, covariance={"weight": 1.0, "pattern": "mul"}, example_inputs=x, keep="mul")
    _, penalties, values = module(x)
    units = values["mul"].movedim(-1 if axis is None else axis, 0).flatten(1)
    c = torch.cov(units)
    torch.testing.assert_close(penalties["covariance"], (c.square().sum() - c.diag().square().sum()) / len(c))


def test_time_is_not_where_a_convolution_reads_its_channels() -> None:
    model = Before(lambda h: h.transpose(1, 2), nn.Conv1d(6, 5, 1))
    with pytest.raises(graphreg.RegularizerError, match=r"at mul: the value goes to a convolution \(conv\), so its axis 1 is channels"):
        graphreg.regularize(model, locked_dropout={"weight": 0.5, "pattern": "mul"})
    plan = graphreg.plan(graphreg.trace(model), graphreg.build("channel_dropout", weight=0.5))
    assert [edit.site.name for edit in plan.of("channel_dropout")] == ["mul"]


class FastFusion(nn.Module):
    """As in EfficientDet: a sum of maps, weighted by elements of a parameter, which have no axes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.w, self.out = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.Parameter(torch.ones(2)), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Any:
        w = self.w.relu()
        w = w / (w.sum() + 1e-4)
        return self.out(w[0] * self.a(x) + w[1] * self.b(x))


class PerExample(nn.Module):
    """A convolution whose groups are the examples."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels, self.weights, self.out = nn.Linear(3, 4), nn.Parameter(torch.randn(4, 8 * 3)), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Any:
        batch, channels, height, width = x.shape
        kernels = (self.kernels(x.mean((2, 3))) @ self.weights).view(batch * 8, 3, 1, 1)
        y = nn.functional.conv2d(x.reshape(1, batch * channels, height, width), kernels, groups=batch)
        return self.out(torch.sigmoid(y.view(batch, 8, height, width)))


def test_scalars_and_examples_as_groups() -> None:
    x = torch.randn(2, 3, 5, 5)
    sites = {site.name: site for site in graphreg.trace(FastFusion(), x).values}
    assert sites["add_1"].channels == 1 and sites["getitem"].channels is None
    sites = {site.name: site for site in graphreg.trace(PerExample(), x).values}
    assert sites["sigmoid"].channels == 1 and sites["sigmoid"].is_map
    assert "hidden" not in {site.role for site in sites.values() if site.name.startswith("view")}  # a kernel is no value that a layer reads


class Canvas(nn.Module):
    """Rows of features are put at places of a canvas, which becomes a map (PointPillars); tokens become a map (hybrids)."""

    def __init__(self, tokens: bool) -> None:
        super().__init__()
        self.lin, self.conv, self.tokens = nn.Linear(5, 8), nn.Conv2d(8, 4, 3, padding=1), tokens

    def forward(self, x: Tensor) -> Any:
        h = self.lin(x).relu()
        if self.tokens:
            return self.conv(h.transpose(1, 2).mul(2).reshape(-1, 8, 4, 4))
        canvas = torch.zeros(len(h), 8, 16)
        canvas[:, :, :3] = h[:, :3].transpose(1, 2)
        return self.conv((canvas + 0).view(-1, 8, 4, 4))


def test_what_becomes_a_map_before_a_convolution_has_its_channels() -> None:
    x = torch.randn(2, 16, 5)
    for tokens, name in ((True, "mul"), (False, "add")):
        sites = {site.name: site for site in graphreg.trace(Canvas(tokens), x).values}
        assert sites[name].channels == 1 and sites[name].is_map
        assert (sites["relu"].channels, sites["relu"].is_map) == ((2, False) if tokens else (None, False))


class Unfolds(nn.Module):
    """The frames of a time-delay network (x-vectors): the last axis of what ``unfold`` returns is time."""

    def __init__(self, as_layer: bool) -> None:
        super().__init__()
        self.kernel, self.unfold = nn.Linear(15, 8), nn.Unfold((3, 5), stride=(1, 5)) if as_layer else None

    def forward(self, x: Tensor) -> Any:
        x = x.unsqueeze(1)
        frames = nn.functional.unfold(x, (3, 5), stride=(1, 5)) if self.unfold is None else self.unfold(x)
        folded = nn.functional.fold(frames, (12, 5), (3, 5), stride=(1, 5)).exp()
        return self.kernel((frames * 2).transpose(1, 2)), folded, x.unfold(2, 3, 1)


@pytest.mark.parametrize("as_layer", [True, False])
@pytest.mark.parametrize("front_end", ["symbolic", "export"])
def test_what_unfold_gathers_has_its_channels_on_axis_1(front_end: Any, as_layer: bool) -> None:
    traced = graphreg.trace(Unfolds(as_layer), torch.randn(4, 12, 5), front_end=front_end)
    channels = {site.name: site.channels for site in traced.values}
    assert channels["mul"] == channels["exp"] == 1 and channels["kernel"] == 2 and channels[traced.values[-1].name] is None
