from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphreg
from graphreg.passes import WeightL2
from two_layers import BEFORE, TwoLayers, X, number, text


def test_before_and_after() -> None:
    module = graphreg.regularize(TwoLayers(), weight_l2=1.0)
    assert (
        text(module.code)
        == """a = self.a(x)
act = self.act(a)
b = self.b(act)
a_weight = self.a.weight
b_weight = self.b.weight
weight_l2 = self.graphreg_rules.weight_l2(a_weight, b_weight)
return graphreg_Regularized(b, {'weight_l2': weight_l2})"""
    )
    assert text(graphreg.strip(module).code) == BEFORE


def test_by_hand() -> None:
    """mean A² = 2/4, mean B² = 20/2: their mean is 5.25; the sum of all squares is 22."""
    for options, value in (({}, 5.25), ({"reduction": "sum"}, 22.0)):
        module = graphreg.regularize(TwoLayers(), WeightL2("*", 0.5, **options))  # type: ignore[arg-type]
        assert number(module(X).penalties["weight_l2"]) == 0.5 * value


def test_the_gradient_is_the_decay_that_the_report_prints() -> None:
    """SGD's weight_decay adds d·w to the gradient; the report's d is the penalty's gradient over w."""
    model = TwoLayers()
    module = graphreg.regularize(model, WeightL2("*", 1e-3))
    module(X).penalties["weight_l2"].backward()
    decays = [number((p.grad / p)[p != 0].mean()) for p in model.parameters()]
    assert decays == pytest.approx([2e-3 / 2 / 4, 2e-3 / 2 / 2], rel=1e-5)
    assert "equivalent SGD weight_decay: 0.00025 to 0.0005, by parameter" in graphreg.report(module).text(None)
    summed = graphreg.regularize(TwoLayers(), WeightL2("*", 1e-3, reduction="sum"))
    assert "equivalent SGD weight_decay: 0.002" in graphreg.report(summed).text(None)


def test_what_must_not_change() -> None:
    """Biases and scales have one dim and are left alone; a tied weight counts once; eval is as train."""
    model = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.Linear(3, 3), nn.Linear(3, 3))
    model[3].weight = model[2].weight
    plan = graphreg.plan(graphreg.trace(model), WeightL2("*", 1.0))
    assert [edit.site.name for edit in plan.edits] == ["0.weight", "2.weight"]
    module = graphreg.regularize(model, WeightL2("*", 1.0))
    assert number(module.eval()(X).penalties["weight_l2"]) == number(module.train()(X).penalties["weight_l2"])


def test_alias() -> None:
    assert isinstance(graphreg.build("weight_decay", weight=1), WeightL2)


def test_errors() -> None:
    with pytest.raises(graphreg.RegularizerError, match="WeightL2: weight=-1.0 is not allowed; weight must be 0 or more"):
        WeightL2("*", -1)
    with pytest.raises(graphreg.RegularizerError, match="WeightL2: reduction='max' is not allowed; reduction must be 'mean' or 'sum'"):
        WeightL2("*", 1, reduction="max")
    with pytest.raises(graphreg.NoMatchError, match="It finds only what cannot be regularized: 0.bias"):
        graphreg.regularize(nn.Sequential(nn.Linear(2, 2)), WeightL2("*.bias", 1))


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The lines that the logger is asked to warn with."""
    lines: list[str] = []
    monkeypatch.setattr(logging.getLogger("graphreg"), "warning", lambda text, *args: lines.append(text % args))
    return lines


CAUTION = (
    "weight_decay: a mean, as in theanets: it pulls {} times more weakly than the weight_decay of an optimizer. As SGD's: "
    "weight_decay={{'weight': {}, 'reduction': 'sum'}}. AdamW's is an option of AdamW, for which graphreg.param_groups makes the groups"
)


def pair() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 2))


@pytest.mark.parametrize(
    ("value", "weaker", "half"),
    [
        # the mean over 20 and over 10 elements, then over two parameters: its derivative is 2 w / 40 and 2 w / 20
        (0.01, "10 to 20", "0.005"),
        ({"weight": 0.01, "pattern": "0.*"}, "10", "0.005"),
        (graphreg.schedules.linear(0.0, 0.1, 10), "10 to 20", "half of it"),
    ],
)
def test_the_keyword_weight_decay_is_told_apart_from_an_optimizers(value: object, weaker: str, half: str, log: list[str]) -> None:
    told = CAUTION.format(weaker, half)
    module = graphreg.regularize(pair(), weight_decay=value)
    assert log == [told]
    assert told.partition(": ")[2] in graphreg.report(module).text(None)
    assert told in str(graphreg.plan(graphreg.trace(net := pair()), graphreg.from_kwargs(net, weight_decay=value)))


def test_where_nothing_is_told_of_weight_decay(log: list[str]) -> None:
    cases: list[dict[str, Any]] = [{"weight_decay": {"weight": 0.01, "reduction": "sum"}}, {"weight_l2": 0.01}, {"weight_decay": 0.0}]
    for keywords in cases:
        assert "theanets" not in graphreg.report(graphreg.regularize(pair(), **keywords)).text(None)
    graphreg.regularize(pair(), graphreg.build("weight_decay", weight=0.01))
    assert log == []


def test_of_a_backend_and_in_place(log: list[str]) -> None:
    in_place = graphreg.regularize_(pair(), weight_decay=0.01, scale=1)
    compiled = torch.compile(pair(), backend=graphreg.backend(weight_decay=0.01, inner="eager"))
    for module in (in_place, compiled):
        module(torch.randn(3, 4))
        assert "weight_decay={'weight': 0.005, 'reduction': 'sum'}" in graphreg.report(module).text(None)
    assert log == [CAUTION.format("10 to 20", "0.005")] * 2


def test_the_cure_is_sgds() -> None:
    """One step of SGD with the penalty of the cure is one with ``weight_decay``."""
    x, steps = torch.randn(3, 4), []
    torch.manual_seed(0)
    start = pair().state_dict()
    cases: list[tuple[float, dict[str, Any]]] = [(0.1, {}), (0.0, {"weight_decay": {"weight": 0.05, "reduction": "sum"}})]
    for decay, keywords in cases:
        (model := pair()).load_state_dict(start)
        groups = [{"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": decay}]
        optimizer = torch.optim.SGD(groups, 0.5)
        output, penalties = graphreg.regularize(model, **keywords)(x)
        (output.square().mean() + sum(penalties.values())).backward()
        optimizer.step()
        steps.append([p.detach() for p in model.parameters()])
    assert all(torch.allclose(one, other) for one, other in zip(*steps, strict=True))


class WideNorm(nn.Module):
    """speechbrain's CRDNN has such norms, and its attention such biases."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.out = nn.Conv1d(4, 8, 1), nn.LayerNorm((8, 5)), nn.Linear(5, 2)
        self.pos_bias_u = nn.Parameter(torch.zeros(2, 8))

    def forward(self, x: Tensor) -> Any:
        return self.out(self.norm(self.conv(x)) + self.pos_bias_u.sum())


class NormedLinear(nn.Linear):
    """mmdet's: a layer of unit weights, and no normalization."""


class LinearWeightNorm(nn.Module):
    """That of Improved GAN: a layer whose weight is normalized."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight, self.scale = nn.Parameter(torch.randn(outputs, inputs)), nn.Parameter(torch.ones(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * (self.scale / self.weight.norm(dim=1))[:, None])


class OwnLayerNorm(nn.Module):
    """A normalization of the last two axes."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(shape)), nn.Parameter(torch.zeros(shape))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape) * self.weight + self.bias


def test_layers_that_are_called_norms() -> None:
    model = nn.Sequential(NormedLinear(4, 3), LinearWeightNorm(3, 5), OwnLayerNorm(2, 5), nn.Linear(5, 2))
    plan = graphreg.plan(graphreg.trace(model), graphreg.build("weight_l2", strength=0.5))
    assert [edit.site.name for edit in plan.edits] == ["0.weight", "1.weight", "3.weight"]


@pytest.mark.parametrize("key", ["weight_l2", "weight_l1", "drop_connect", "weight_noise"])
def test_norms_and_biases_of_two_dims_are_no_weights(key: str) -> None:
    traced = graphreg.trace(WideNorm())
    sites = [edit.site.name for edit in graphreg.plan(traced, graphreg.build(key, strength=0.5)).edits]
    assert sites == ["conv.weight", "out.weight"]
    named = graphreg.plan(traced, graphreg.build(key, strength=0.5, pattern=["norm.weight", "pos_bias_u"]))
    assert [edit.site.name for edit in named.edits] == ["pos_bias_u", "norm.weight"]


class Scaled(nn.Module):
    """A scale and a shift that are shaped for broadcasting, and a kernel of one unit."""

    def __init__(self) -> None:
        super().__init__()
        self.grn = nn.Module()
        self.grn.weight, self.grn.bias = nn.Parameter(torch.ones(1, 1, 4)), nn.Parameter(torch.zeros(1, 1, 4))
        self.gamma, self.row = nn.Parameter(torch.ones(1, 1, 4)), nn.Parameter(torch.ones(1, 4))
        self.conv, self.lin = nn.Conv1d(1, 4, 1), nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        z = self.lin(self.conv(x).transpose(1, 2))
        return (self.gamma * (z * self.grn.weight + self.grn.bias)) * self.row


def test_a_vector_that_is_shaped_for_broadcasting_is_no_weight() -> None:
    model = Scaled()
    sites = ["row", "conv.weight", "lin.parametrizations.weight.original1"]
    assert [edit.site.name for edit in graphreg.plan(graphreg.trace(model), WeightL2("*", 0.1)).of("weight_l2")] == sites
    assert graphreg.plan(graphreg.trace(model), WeightL2("gamma", 0.1)).of("weight_l2")  # by its name
    decayed = graphreg.param_groups(model, default={"weight_decay": 0.1}, decay="standard")
    ids = {id(p): name for name, p in model.named_parameters()}
    kept = [ids[id(p)] for group in decayed if group["weight_decay"] for p in group["params"]]
    assert kept == ["conv.weight", "lin.parametrizations.weight.original1"]
