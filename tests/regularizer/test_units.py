"""The axis of units: the channels of what a convolution gives, else the last axis, or the one that is asked for."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, ClassVar

import einops
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphreg
from graphreg import Penalty, RegularizerError
from graphreg.ir.units import Units
from graphreg.passes import DeCov, VarianceFloor


class Shape(Penalty):
    """Gives [samples, units] as one number: 1000 samples + units."""

    axis: int | None = None

    def __call__(self, units: Tensor) -> Tensor:
        return units.sum() * 0 + 1000 * units.shape[0] + units.shape[1]


class Net(nn.Module):
    """Values of all kinds, from images of 2 x 3 x 4 x 5: two examples, three channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.Linear(6, 7)
        self.rnn, self.wide = nn.GRU(6, 8, batch_first=True), nn.Linear(6 * 20, 9)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        act = F.relu(self.norm(self.conv(x)))
        up = F.interpolate(act + act.mean((2, 3), keepdim=True), scale_factor=2.0)
        last = self.fc(act.permute(0, 2, 3, 1))
        steps, _ = self.rnn(act.mean(3).transpose(1, 2))
        pooled = act.amax((2, 3))
        return up, last, steps, pooled, self.wide(act.flatten(1))


X = torch.arange(120.0).reshape(2, 3, 4, 5) / 120
FOUND = {  # by site: samples, units, and whether these are channels
    "conv": (40, 6, True), "relu": (40, 6, True), "interpolate": (160, 6, True), "permute": (40, 6, False), "fc": (40, 7, False),
    "rnn": (8, 8, False), "amax": (2, 6, False), "flatten": (2, 120, False), "wide": (2, 9, False),
}  # fmt: skip


@pytest.mark.parametrize("front_end", ["symbolic", "export"])
def test_the_axis_of_each_kind_of_value(front_end: Any) -> None:
    regularizers = [Shape(site, 1.0, name=site) for site in FOUND]
    traced = graphreg.trace(Net(), X, front_end)
    plan = graphreg.plan(traced, regularizers)
    assert {edit.name: edit.units.channels for edit in plan.edits if edit.units} == {site: found[2] for site, found in FOUND.items()}
    penalties = graphreg.rewrite(traced, plan)(X).penalties
    assert {name: divmod(int(value), 1000) for name, value in penalties.items()} == {site: found[:2] for site, found in FOUND.items()}


def test_an_example_without_the_batch_axis_has_the_same_channels() -> None:
    module = graphreg.regularize(nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(6, 2, 1)), Shape("1", 1.0, name="size"))
    assert [int(module(x).penalties["size"].detach()) for x in (X, X[0])] == [40_006, 20_006]


def test_the_axis_that_is_asked_for() -> None:
    for axis, value in ((0, 120_002), (1, 40_006), (2, 60_004), (-1, 48_005)):
        module = graphreg.regularize(Net(), Shape("relu", 1.0, axis=axis, name="size"))
        assert int(module(X).penalties["size"].detach()) == value


def test_the_matrix_by_hand() -> None:
    value = torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[5.0, 6.0], [7.0, 8.0]]])
    assert Units(1).of(value, "").tolist() == [[1, 3], [2, 4], [5, 7], [6, 8]]
    assert Units().of(value, "").tolist() == [[1, 2], [3, 4], [5, 6], [7, 8]]


def test_plan_and_report_say_it() -> None:
    model = Net()
    several = ["relu", "fc", "rnn", "wide", "flatten"]
    regularizers = [DeCov("relu", 0.1), VarianceFloor(several, 0.1), Shape("relu", 0.1, axis=2, name="size")]
    plan = graphreg.plan(graphreg.trace(model), regularizers)
    lines = [
        "decov: the units are the channels, all other axes are samples",
        "variance_floor: the units are the channels of relu, and the last axis of fc, rnn, flatten and 1 more; all other axes are samples",
        "size: the units are axis 2, all other axes are samples",
    ]
    assert str(plan).splitlines()[-3:] == lines
    entries = graphreg.report(graphreg.rewrite(graphreg.trace(model), plan)).regularizers
    assert [f"{entry.name}: {entry.notes[-1]}" for entry in entries] == lines
    assert [entry.notes[:-1] for entry in entries] == [(), ("mean over 5 values",), ()]


def test_a_backend_reads_them_the_same_way() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(6, 2, 1))
    compiled = torch.compile(model, backend=graphreg.backend(DeCov("1", 1.0), inner="eager"))
    compiled(X)
    expected = graphreg.regularize(model, decov=1.0)(X).penalties["decov"]
    torch.testing.assert_close(graphreg.backend_of(compiled).penalties()["decov"], expected)


# What is refused


@pytest.mark.parametrize("known", [True, False])
def test_values_without_samples_and_units(known: bool) -> None:
    class Sums(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x).sum(1)

    x = torch.ones(2, 3)
    options: dict[str, Any] = {"example_inputs": x} if known else {}
    sentence = r"Shape at sum: the value has shape \(2,\); the penalty needs samples of units, 2 dims or more\. Select another value, or"
    with pytest.raises(RegularizerError, match=sentence):
        graphreg.regularize(Sums(), Shape("sum*", 1.0), **options)(x)
    with pytest.raises(RegularizerError, match=r"Shape at fc: axis=-3 is out of range for a value of shape \(2, 3\); give the axis of the"):
        graphreg.regularize(Sums(), Shape("fc", 1.0, axis=-3), **options)(x)


def test_an_axis_that_is_no_number() -> None:
    for axis in ("channels", 1.0, True):
        with pytest.raises(RegularizerError, match=r"Shape: axis=.* is not allowed; give the axis of the units, a whole number, or None"):
            Shape("*", 1.0, axis=axis)  # type: ignore[arg-type]


def test_units_in_two_forms() -> None:
    for other in ("z", "values", "steps"):
        with pytest.raises(RegularizerError, match=rf"Both\.__call__ asks for .* and for .*(units|{other}); it gets"):
            exec(f"class Both(Penalty):\n    def __call__(self, units, {other}): ...", {"Penalty": Penalty})
    with pytest.raises(RegularizerError, match="asks for vjp and for units"):

        class Both(Penalty):
            def __call__(self, units: Tensor, vjp: Any) -> Tensor: ...


def test_a_formula_that_is_not_pure_is_found_on_units() -> None:
    class Writes(Penalty):
        def __call__(self, units: Tensor) -> Tensor:
            return units.mul_(2).sum()

    with pytest.raises(RegularizerError, match="writes into a tensor that it did not make"):
        graphreg.regularize(Net(), Writes("fc", 1.0))


def test_values_in_a_range_are_tried_in_it() -> None:
    seen: list[Tensor] = []

    class Logarithm(Penalty):
        value_range = (0.0, 2.0)

        def __call__(self, z: Tensor) -> Tensor:
            seen.append(z.detach())
            return z.mean()

    graphreg.regularize(Net(), Logarithm("fc", 1.0))
    assert seen and all(z.min() >= 0 and z.max() <= 2 for z in seen)


@pytest.mark.parametrize(("layer", "shape"), [(nn.Conv1d, (3, 5)), (nn.ConvTranspose1d, (3, 5)), (nn.Conv2d, (3, 5, 4))])
def test_a_convolution_of_one_example_without_a_batch_axis(layer: Any, shape: tuple[int, ...]) -> None:
    module = graphreg.regularize(nn.Sequential(layer(3, 6, 1), nn.Sigmoid()), DeCov("1", 1.0), Shape("1", 1.0))
    x = torch.randn(shape)
    one, batch = module(x).penalties, module(x[None]).penalties
    assert int(one["shape"]) == 1000 * x[0].numel() + 6
    torch.testing.assert_close(one, batch)


NOT_KNOWN = "it is not known which axis of this value has the units of the layer that made it."


class Moved(nn.Module):
    """Values whose units operations have moved to axis 1 or 2, away from the end."""

    WAYS: ClassVar[dict[str, Callable[[Any, Tensor], Tensor]]] = {
        "logits as a cross entropy reads them": lambda m, x: m.head(m.first(x).relu()).chunk(1, -1)[0].transpose(1, 2) / 2 + 1,
        "a recurrent layer": lambda m, x: torch.tanh(m.rnn(x)[0].transpose(1, 2)) * 2,
        "anchors of a detector": lambda m, x: m.conv(x).view(x.shape[0], 2, 7, 4).exp(),
        "boxes of a detector": lambda m, x: m.conv(x).permute(0, 2, 1).reshape(3, -1, 7).transpose(1, 2),
        "heads of several digits": lambda m, x: m.digits(x.mean(1)).view(-1, 3, 7).transpose(1, 2),
        "a tied head": lambda m, x: (m.first(x) @ m.words.weight.t()).transpose(1, 2),
        "weights first": lambda m, x: m.words.weight @ m.first(x).transpose(1, 2),
        "einsum": lambda m, x: torch.einsum("btd,vd->bvt", m.first(x), m.words.weight),
        "steps that are stacked": lambda m, x: torch.stack([m.head(m.first(x[:, t])) for t in range(5)], -1),
        "centred logits": lambda m, x: (y := m.head(m.first(x)).transpose(1, 2)) - y.mean(1, keepdim=True),
        "gated experts": lambda m, x: (
            torch.stack([m.head(m.first(x)), m.digits(x)[..., :7]], 1) * x[:, :2, :1, None].sigmoid()
        ).sum(1).transpose(1, 2),
        "a biaffine score": lambda m, x: torch.einsum("bti,cij,bsj->bcts", m.first(x), m.cube, m.first(x)),
        "einops": lambda m, x: einops.rearrange(m.digits(x), "b t (d c) -> b c (t d)", c=7),
        "the largest of the steps": lambda m, x: m.head(m.first(x)).unsqueeze(2).expand(-1, -1, 2, -1).max(2).values.transpose(1, 2),
        "a layer for each class": lambda m, x: torch.stack([m.one(x[:, t]).squeeze(-1) for t in range(5)], 1),
        "distances to prototypes": lambda m, x: (m.first(x.mean(1))[:, None] - m.words.weight).square().sum(-1),
        "a cosine head": lambda m, x: nn.functional.cosine_similarity(m.first(x.mean(1))[:, None], m.words.weight[None], dim=-1),
        "classes times a map": lambda m, x: torch.einsum("qc,bct->bqt", m.first(m.cube[:, 0, :4]), m.conv(x)[:, :6]),
        "shuffled pixels": lambda m, x: nn.PixelShuffle(2)(m.map(x[:, None])),
        "a new axis at the end": lambda m, x: m.head(m.first(x.mean(1)))[..., None] * x[:1, :2, 0],
        "pixels of patches": lambda m, x: m.digits(x).view(-1, 5, 3, 7).permute(0, 3, 1, 2).reshape(-1, 7, 15),
    }  # fmt: skip

    def __init__(self, way: str) -> None:
        super().__init__()
        self.first, self.head, self.rnn, self.conv = nn.Linear(4, 6), nn.Linear(6, 7), nn.GRU(4, 7, batch_first=True), nn.Conv1d(5, 14, 1)
        self.map = nn.Conv2d(1, 28, 1)
        self.one, self.cube = nn.Linear(4, 1), nn.Parameter(torch.rand(7, 6, 6))
        self.digits, self.words, self.way = nn.Linear(4, 21), nn.Embedding(7, 6), way

    def forward(self, x: Tensor) -> Tensor:
        return self.WAYS[self.way](self, x)


@pytest.mark.parametrize("way", Moved.WAYS)
def test_the_units_of_a_layer_are_followed(way: str) -> None:
    model, x = Moved(way), torch.randn(3, 5, 4)
    site = graphreg.trace(model, x).values[-1].name
    for module in (
        graphreg.regularize(model, z_loss={"strength": 1.0, "pattern": site}, example_inputs=x),
        graphreg.regularize(model, z_loss={"strength": 1.0, "pattern": site, "axis": 2 if "anchors" in way else 1}),
        graphreg.regularize_(copy.deepcopy(model), z_loss={"strength": 1.0, "pattern": site}, penalties="return"),
    ):
        output, penalties = module(x)
        torch.testing.assert_close(penalties["z_loss"], output.logsumexp(2 if "anchors" in way else 1).square().mean())
    try:  # without shapes, the answer is the same, or asked for
        bare = graphreg.regularize(model, z_loss={"strength": 1.0, "pattern": site})
    except RegularizerError as error:
        assert str(error).endswith(f"{site}: {NOT_KNOWN} Give example_inputs, or axis=.")
    else:
        torch.testing.assert_close(bare(x).penalties["z_loss"], penalties["z_loss"])


class Written(Moved):
    def forward(self, x: Tensor) -> Tensor:
        y = torch.zeros(len(x), 7, 5)
        for t in range(5):
            y[:, :, t] = self.head(self.first(x[:, t]))
        return y


def test_units_of_an_output_that_are_not_known_are_asked_for() -> None:
    model, x = Written(""), torch.randn(3, 5, 4)
    with pytest.raises(RegularizerError, match=f"written: {NOT_KNOWN} Give axis=.$"):
        graphreg.regularize(model, z_loss=1.0, example_inputs=x)
    penalty = graphreg.regularize(model, z_loss={"strength": 1.0, "axis": 1}, example_inputs=x)(x).penalties["z_loss"]
    torch.testing.assert_close(penalty, model(x).logsumexp(1).square().mean())


def test_a_similarity_has_no_units() -> None:
    """The logits of images and texts, and their transpose, each have a softmax over the last axis."""

    class Similarity(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.images, self.texts = nn.Linear(6, 5), nn.Linear(4, 5)

        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            logits = self.images(x) @ self.texts(y).t()
            return logits, logits.t()

    model, given = Similarity(), (torch.randn(3, 6), torch.randn(3, 4))
    for options in ({}, {"example_inputs": given}):
        penalty = graphreg.regularize(model, z_loss=1.0, **options)(*given).penalties["z_loss"]
        torch.testing.assert_close(penalty, sum(each.logsumexp(-1).square().mean() for each in model(*given)) / 2)


class Patches(nn.Module):
    """The channels of a convolution, and the units that a layer norm leaves last, need no shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.back = nn.Conv2d(3, 8, 2), nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x).flatten(2).transpose(1, 2) * 2
        return self.back(h) + torch.sigmoid(self.norm(self.back(x).permute(0, 1, 3, 2))).sum()


def test_units_that_are_known_without_shapes() -> None:
    for pattern in ("mul", "sigmoid"):
        plan = graphreg.plan(graphreg.trace(Patches()), DeCov(pattern, 1.0))
        assert "the units are the last axis" in str(plan)


def test_behind_a_norm_of_maps_the_channels_are_known_without_shapes() -> None:
    for norm in (nn.BatchNorm2d(2), nn.InstanceNorm2d(2)):
        model = nn.Sequential(nn.Linear(3, 6), norm, nn.Sigmoid(), nn.Linear(6, 2))
        assert {site.name: site.channels for site in graphreg.trace(model, torch.randn(2, 2, 4, 3)).values}["2"] == 1
        assert "the units are the channels" in str(graphreg.plan(graphreg.trace(model), DeCov("2", 1.0)))


class Long(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.head(x).transpose(1, 2)
        for _ in range(1000):
            y = y - y.logsumexp(1, keepdim=True)
        return y


def test_a_long_way_from_the_layer() -> None:
    [edit] = graphreg.plan(graphreg.trace(Long(), torch.randn(2, 5, 4), prove=False), graphreg.build("z_loss", weight=1.0)).edits
    assert edit.units is not None and edit.units.axis == -2
