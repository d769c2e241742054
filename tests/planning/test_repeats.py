"""Splices of one kind that act on one value again and again: what is said, what to select, and when nothing is said."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from timm.layers import DropPath
from torch import Tensor, nn

import graphreg
from graphreg import Splice
from graphreg.passes import BernoulliDropout, GaussianNoise
from language_models import MODELS


class Mlp(nn.Module):
    """As in timm: an activation, a dropout, and a norm that is often an identity."""

    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.act, self.drop, self.norm = nn.GELU(), nn.Dropout(0.0), norm(64)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.drop(self.act(x)))


class Net(nn.Module):
    def __init__(self, norm: Callable[[int], nn.Module] = nn.LayerNorm, depth: int = 1) -> None:
        super().__init__()
        self.into = nn.Linear(8, 64)
        self.layers = nn.ModuleList(nn.ModuleDict({"mlp": Mlp(norm), "out": nn.Linear(64, 64)}) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x)
        for layer in self.layers:
            x = layer["out"](layer["mlp"](x))
        return x


@contextmanager
def told(*sentences: str) -> Iterator[None]:
    """These warnings are given inside, and no others."""
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        yield
    assert [str(one.message) for one in given] == list(sentences)


IN_A_ROW = (
    "dropout acts 3 times in a row on one value (layers.0.mlp.act, layers.0.mlp.drop, layers.0.mlp.norm, which differ only by views, "
    "dropout, norms and scale): 0.125 of it is kept, not 0.5. To act once, select '{}'."
)


@pytest.mark.parametrize(("norm", "hidden"), [(nn.LayerNorm, "norm"), (nn.RMSNorm, "norm"), (lambda n: nn.Identity(), "act")])
def test_the_share_that_is_kept(norm: Any, hidden: str) -> None:
    selector = f"layers.0.mlp.{hidden}"
    with told(IN_A_ROW.format(selector)):
        module = graphreg.regularize(Net(norm), dropout={"**.mlp.*": 0.5}, rng=0)
    line = (
        "dropout acts 3 times in a row on one value (layers.0.mlp.act, layers.0.mlp.drop, layers.0.mlp.norm): 0.125 of it is kept, not 0.5"
    )
    assert line in graphreg.report(module, cost=False).notes
    assert line in graphreg.report(module, cost=False).text(None)
    graphreg.set_strength(module, "dropout", 0.1)
    assert any("0.729 of it is kept, not 0.9" in note for note in graphreg.report(module, cost=False).notes)
    graphreg.set_strength(module, "dropout", 0.0)
    assert not any("in a row" in note for note in graphreg.report(module, cost=False).notes)
    with told():
        graphreg.regularize(Net(norm), dropout={selector: 0.5})


def test_a_plan_says_it_too() -> None:
    traced, regularizer = graphreg.trace(Net()), BernoulliDropout("**.mlp.*", 0.5)
    with told(IN_A_ROW.format("layers.0.mlp.norm")):
        plan = graphreg.plan(traced, regularizer)
    assert str(plan).endswith("(layers.0.mlp.act, layers.0.mlp.drop, layers.0.mlp.norm): 0.125 of it is kept, not 0.5")
    assert plan.to_dict()["repeats"] == [["layers.0.mlp.act", "layers.0.mlp.drop", "layers.0.mlp.norm"]]


def test_it_is_the_share_that_a_run_keeps() -> None:
    """Where a norm subtracts nothing, what is kept is what is not 0."""
    seen = list[Tensor]()
    with pytest.warns(UserWarning, match="0.125 of it is kept"):
        module = graphreg.regularize(Net(lambda n: nn.Identity()), dropout={"**.mlp.*": 0.5}, rng=0)
    module.get_submodule("layers.0.out").register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    module(torch.randn(4096, 8))
    assert (seen[0] != 0).double().mean().item() == pytest.approx(0.125, abs=0.01)


def test_the_warning_points_at_the_users_line() -> None:
    with pytest.warns(UserWarning, match="in a row") as given:
        graphreg.regularize(Net(), dropout={"**.mlp.*": 0.5})
    assert given[0].filename == __file__


def test_several_regularizers_of_a_kind() -> None:
    sentence = (
        "dropout and dropout_1 act one after another on one value (layers.0.mlp.act, layers.0.mlp.norm, which differ only by views, "
        "dropout, norms and scale): 0.72 of it is kept, not 0.8. To act once, select 'layers.0.mlp.norm'."
    )
    with told(sentence):
        graphreg.regularize(Net(), dropout={"**.act": 0.1, "**.norm": 0.2})
    with told():  # of strength 0, and of two kinds
        graphreg.regularize(Net(), dropout={"**.act": 0.0, "**.norm": 0.2}, noise={"**.drop": 0.1})


def test_noise_adds_up() -> None:
    with pytest.warns(
        UserWarning, match=r"noise acts 2 times .* the noise adds up to a standard deviation of 0\.141 .* not 0\.1\. To act once, select"
    ):
        graphreg.regularize(Net(), GaussianNoise(["**.act", "**.drop"], 0.1))


def test_one_sentence_for_many_places_with_a_glob_that_means_one_of_each() -> None:
    sentence = (
        "dropout acts 3 times in a row on one value (layers.0.mlp.act, layers.0.mlp.drop, layers.0.mlp.norm, which differ only by views, "
        "dropout, norms and scale, and so on at 4 more places): 0.729 of it is kept, not 0.9. To act once, select 'layers.*.mlp.norm'."
    )
    with told(sentence):
        plan = graphreg.plan(graphreg.trace(Net(depth=5)), BernoulliDropout("**.mlp.*", 0.1))
    assert str(plan).splitlines()[-1] == "and so on at 2 more places"
    with told():
        graphreg.plan(graphreg.trace(Net(depth=5)), BernoulliDropout("layers.*.mlp.norm", 0.1, expect=5))


class Views(nn.Module):
    """``way`` leads from one value to another."""

    def __init__(self, way: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.mark, self.way = nn.Linear(4, 4), nn.Tanh(), way
        self.p = nn.Parameter(torch.ones(4))
        self.end = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.mark(self.a(x))
        return self.end(self.way(h) if self.way.__code__.co_argcount == 1 else self.way(h, self))  # type: ignore[call-arg]


@pytest.mark.parametrize(("way", "same"), [
    (lambda h: h.reshape(-1), True), (lambda h: h.transpose(0, 1).contiguous(), True), (lambda h: h[:, 0], True),
    (lambda h: h.chunk(2, -1)[1], True), (lambda h: F.dropout(h, 0.1), True), (lambda h: -h * 2 / 3, True), (lambda h: 2 * h, True),
    (lambda h, m: h * m.p, True), (lambda h, m: m.p * h, True), (lambda h, m: h / m.p, True), (lambda h: F.layer_norm(h, (4,)), True),
    (lambda h: 1 / h, False), (lambda h: h * h, False), (lambda h: h * torch.sigmoid(h), False), (lambda h: h + 1, False),
    (lambda h: h.relu(), False), (lambda h, m: m.a(h), False), (lambda h: h / h.sum(), False), (lambda h: torch.cat([h, h]), False),
])  # fmt: skip
def test_what_is_the_same_value(way: Any, same: bool) -> None:
    traced = graphreg.trace(Views(way))
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        graphreg.plan(traced, BernoulliDropout(["mark", "end"], 0.5))
    assert len(given) == same


IMAGE = torch.zeros(1, 3, 32, 32)
IDS = {"input_ids": torch.zeros(2, 7, dtype=torch.long), "use_cache": False}


def vit() -> nn.Module:
    return torchvision.models.VisionTransformer(image_size=32, patch_size=16, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32)


@pytest.mark.parametrize(
    ("make", "example"), [(torchvision.models.resnet18, IMAGE), (vit, IMAGE), (MODELS["bert"], {"input_ids": IDS["input_ids"]}),
    (MODELS["gpt2"], IDS)],
    ids=["resnet18", "vit", "bert", "gpt2"],
)  # fmt: skip
def test_no_alarm_at_the_default_sites(make: Any, example: Any) -> None:
    traced = graphreg.trace(make(), example)
    for selector in ("*", "**#hidden"):
        with told():
            graphreg.plan(traced, [BernoulliDropout(selector, 0.1), GaussianNoise(selector, 0.1)])


def test_insides_on_purpose_are_one_sentence() -> None:
    traced = graphreg.trace(torchvision.models.resnet18())
    sentence = (
        "dropout acts 2 times in a row on one value (layer4.0.conv1, layer4.0.bn1, which differ only by views, dropout, norms and scale, "
        "and so on at 4 more places): 0.81 of it is kept, not 0.9. To act once, select ['layer4.*.conv1', 'layer4.*.conv2', "
        "'layer4.0.downsample.0']."
    )
    with told(sentence):
        graphreg.plan(traced, BernoulliDropout("layer4.**", 0.1))
    with told():
        graphreg.plan(traced, BernoulliDropout(["layer4.*.conv1", "layer4.*.conv2", "layer4.*.downsample.0"], 0.1, expect=5))
        graphreg.plan(traced, BernoulliDropout("layer4.*", 0.1))


def test_a_splice_that_says_nothing_of_it_is_not_warned_about() -> None:
    class Rounded(Splice):
        def __call__(self, z: Tensor, weight: Tensor) -> Tensor:
            return z + 0 * weight

    with told():
        graphreg.regularize(Net(), Rounded("**.mlp.*", 0.5))


def test_a_backend_says_it_once() -> None:
    backend = graphreg.backend(inner="eager", dropout={"**.mlp.*": 0.5})
    with pytest.warns(UserWarning, match="dropout acts 3 times in a row on one value") as given:
        torch.compile(Net(), backend=backend)(torch.zeros(2, 8))
    assert len([one for one in given if "in a row" in str(one.message)]) == 1
    assert any("0.125 of it is kept" in note for note in backend.report().notes)


# Beside the model's own dropout


class Residual(nn.Module):
    """Blocks with dropout of elements and with drop path, as in timm."""

    def __init__(self, rate: float = 0.2, depth: int = 3, path: float = 0.1) -> None:
        super().__init__()
        block = {"into": nn.Linear, "out": nn.Linear}
        self.blocks = nn.ModuleList(
            nn.ModuleDict({name: kind(8, 8) for name, kind in block.items()} | {"drop": nn.Dropout(rate), "path": DropPath(path)})
            for _ in range(depth)
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block["path"](block["out"](block["drop"](block["into"](x).relu())))  # type: ignore[index]
        return x


BESIDE = (
    "dropout and the model's own Dropout 0.2 act one after another on one value (relu, blocks.0.drop, and so on at 2 more places): 0.72 of "
    "it is kept, not 0.8. own_dropout={'blocks.*.drop': 'off'} turns the model's own off"
)
PATHS = (
    "drop_path and the model's own DropPath 0.1 act one after another on one value (blocks.0.path, and so on at 2 more places): 0.72 of it "
    "is kept, not 0.8. own_dropout={'blocks.*.path': 'off'} turns the model's own off"
)


def beside(lines: Sequence[str]) -> list[str]:
    return [line for line in lines if "the model's own" in line]


def test_beside_the_models_own_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan, a report and the log say it, once for each regularizer, with what to do; following it, there is nothing to say."""
    logged: list[str] = []
    monkeypatch.setattr(logging.getLogger("graphreg"), "warning", lambda text, *args: logged.append(text % args))
    given: dict[str, Any] = {"dropout": {"*": 0.1}, "drop_path": 0.2}
    traced = graphreg.trace(Residual())
    with told():
        plan = graphreg.plan(traced, graphreg.from_kwargs(traced, **given))
        module = graphreg.regularize(Residual(), **given, rng=0)
    assert beside(str(plan).splitlines()) == beside(graphreg.report(module, cost=False).notes) == beside(logged) == [BESIDE, PATHS]
    graphreg.set_strength(module, "dropout", 0.5)
    graphreg.set_strength(module, "drop_path", 0.0)
    (line,) = beside(graphreg.report(module, cost=False).notes)
    assert "0.4 of it is kept, not 0.5" in line
    rates = graphreg.plan(traced, graphreg.from_kwargs(traced, **given), own_dropout={"blocks.*.drop": 0.5, "blocks.[01].path": "off"})
    assert [line.partition(" one after another")[0] for line in rates.beside_native] == [
        "dropout and the model's own Dropout 0.5 act", "drop_path and the model's own DropPath 0.1 act"
    ]  # fmt: skip
    assert "(blocks.2.path): 0.72" in rates.beside_native[1]
    other = graphreg.plan(traced, graphreg.from_kwargs(traced, **given), own_dropout={"blocks.1.drop": 0.5})
    assert "(relu, blocks.0.drop, and so on at 2 more places with other rates): 0.72" in other.beside_native[0]
    assert "other rates" not in other.beside_native[1]
    off = graphreg.plan(traced, graphreg.from_kwargs(traced, **given), own_dropout={"blocks.*.drop": "off", "blocks.*.path": "off"})
    assert off.beside_native == [] and beside(str(off).splitlines()) == []


def test_it_is_the_share_that_a_run_keeps_beside_the_models_own() -> None:
    """At the value that the model's own dropout makes, too."""
    for selector in ("relu", "blocks.0.drop"):
        seen = list[Tensor]()
        model = Residual(0.5, depth=1)
        module = graphreg.regularize(model, dropout={selector: 0.5}, rng=0)
        assert ["0.25 of it is kept, not 0.5" in line for line in beside(graphreg.report(module, cost=False).notes)] == [True]
        module.get_submodule("blocks.0.out").register_forward_pre_hook(lambda _, given, seen=seen: seen.append(given[0]))
        module(torch.ones(4096, 8))
        kept = (seen[0] != 0).double().mean(0).max().item()  # of a unit whose ReLU lets all of them through
        assert kept == pytest.approx(0.25, abs=0.03)


@pytest.mark.parametrize(
    ("model", "given"),
    [
        (Residual(0.0, path=0.0), {"dropout": {"*": 0.1}, "drop_path": 0.2}),  # the model's own rates are 0
        (Residual(), {"noise": {"relu*": 0.1}}),  # another kind
        (Residual(), {"dropout": {"blocks.*.path": 0.1}}),  # drop path, and dropout of elements
        (Residual(), {"dropout": {"blocks.*.into": 0.1}}),  # a ReLU is between
        (nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.1), nn.Dropout(0.1), nn.Linear(4, 4)), {"dropout": {"3": 0.1}}),  # no splice
    ],
)
def test_nothing_is_said_where_the_models_own_does_not_act_on_the_value(model: nn.Module, given: dict[str, Any]) -> None:
    assert beside(str(graphreg.plan(graphreg.trace(model), graphreg.from_kwargs(model, **given))).splitlines()) == []


def test_timm_and_the_backend() -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, drop_path_rate=0.1)
    traced = graphreg.trace(model, torch.zeros(1, 3, 32, 32))
    (line,) = graphreg.plan(traced, graphreg.from_kwargs(traced, drop_path=0.2)).beside_native
    assert line.startswith("drop_path and the model's own DropPath 0.1 act one after another on one value (blocks.1.drop_path1, and so")
    backend = graphreg.backend(inner="eager", dropout={"**@relu": 0.1})
    torch.compile(Residual(), backend=backend)(torch.zeros(2, 8))
    assert len(beside(backend.report().notes)) == 1


@pytest.mark.parametrize(
    ("regularizers", "note"),
    [
        ({"dropout": {"enc": 0.5}}, "not at enc.1_1, enc.1_2, further calls of enc"),
        ({"contractive": {"strength": 1.0, "pattern": "enc"}}, "not at enc.1_1, enc.1_2, further calls of enc; with"),
        ({"hidden_l2": {"strength": 1.0, "pattern": ["enc", "enc_1"]}}, "not at enc.1_2, further calls of enc"),
        ({"dropout": {"enc*": 0.5}}, ""),
        ({"hidden_dropout": 0.5}, ""),
        ({"recurrent_state": {"strength": 1.0, "pattern": "cell"}}, ""),  # takes all calls
    ],
)
def test_the_calls_of_a_module_that_its_name_leaves_out(regularizers: Any, note: str) -> None:
    class Calls(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enc, self.cell = nn.Sequential(nn.Linear(4, 4), nn.Tanh()), nn.GRUCell(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            h = x
            for _ in range(3):
                h = self.cell(self.enc(x), h)
            return h

    model = Calls()
    planned = graphreg.plan(graphreg.trace(model), graphreg.from_kwargs(model, **regularizers))
    shown = planned, graphreg.report(graphreg.regularize(model, **regularizers))
    plan, report = (" ".join(str(each).split()) for each in shown)  # without line breaks
    assert (note in plan and note in report) if note else "further calls" not in plan + report
