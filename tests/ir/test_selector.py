"""The one rule by which selectors find sites: tables of (selector, sites), and spellings that must be equivalent."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import graphreg
from graphreg import NoMatchError, Site, Traced, regularize
from graphreg.ir.selector import exactly
from graphreg.passes import BernoulliDropout, HiddenL1, WeightL2

# what is selected here is selected to be counted, insides and all
pytestmark = pytest.mark.filterwarnings("ignore:.* (in a row|one after another) on one value:UserWarning")
Selector = str | Sequence[str] | Callable[[Site], bool]


def found(traced: Traced, selector: Selector, cls: Any = BernoulliDropout) -> list[Site]:
    """The sites that a regularizer acts on, in order."""
    return [edit.site for edit in graphreg.plan(traced, cls(selector, 0.1)).edits]


def named(traced: Traced, names: Sequence[str]) -> list[Site]:
    """The sites of these names, any of a site's own."""
    known = {name: site for site in traced.sites for name in site.names}
    return [known[name] for name in names]


# Values of a ResNet

RESNET = graphreg.trace(torchvision.models.resnet18(num_classes=10))
HIDDEN = (
    "maxpool layer1.0.relu layer1.0 layer1.1.relu layer1.1 layer2.0.relu layer2.0 layer2.1.relu layer2.1 layer3.0.relu layer3.0 "
    "layer3.1.relu layer3.1 layer4.0.relu layer4.0 layer4.1.relu avgpool"
)
LAYER4 = (
    "layer4.0.conv1 layer4.0.bn1 layer4.0.relu layer4.0.conv2 layer4.0.bn2 layer4.0.downsample.0 layer4.0.downsample.1 layer4.0.add "
    "layer4.0.relu_1 layer4.1.conv1 layer4.1.bn1 layer4.1.relu layer4.1.conv2 layer4.1.bn2 layer4.1.add layer4.1.relu_1"
)


@pytest.mark.parametrize(
    ("selector", "names"),
    [
        # a thing, and its insides
        ("layer4", "layer4.1.relu_1"),
        ("layer4*", "layer4.1.relu_1"),
        ("layer4.*", "layer4.0.relu_1 layer4.1.relu_1"),
        ("layer4.**", LAYER4),
        ("layer4**", LAYER4),
        ("layer3.1.*", "layer3.1.conv1 layer3.1.bn1 layer3.1.relu layer3.1.conv2 layer3.1.bn2 layer3.1.add layer3.1.relu_1"),
        ("layer4.0.downsample*", "layer4.0.downsample.1"),
        ("layer4.0.downsample.*", "layer4.0.downsample.0 layer4.0.downsample.1"),
        ("*downsample.0", "layer2.0.downsample.0 layer3.0.downsample.0 layer4.0.downsample.0"),
        ("layer*", "layer1 layer2 layer3 layer4"),
        ("*.relu", "layer1.0.relu layer1.1.relu layer2.0.relu layer2.1.relu layer3.0.relu layer3.1.relu layer4.0.relu layer4.1.relu"),
        ("l*4.1.*1", "layer4.1.conv1 layer4.1.bn1 layer4.1.relu_1"),
        # shell globs
        ("layer?", "layer1 layer2 layer3 layer4"),
        ("layer?.1", "layer1.1 layer2.1 layer3.1 layer4.1"),
        ("layer[34]", "layer3 layer4"),
        ("layer[34].*", "layer3.0 layer3.1 layer4.0 layer4.1"),
        ("layer[2-4]", "layer2 layer3 layer4"),
        ("layer[!12]", "layer3 layer4"),
        ("[cf]*[!n]", "conv1 fc"),
        # ops: classes of modules, names of functions; filters apply first
        ("layer4.**@ReLU", "layer4.0.relu layer4.0.relu_1 layer4.1.relu layer4.1.relu_1"),
        ("layer4*@ReLU", "layer4.0.relu layer4.0.relu_1 layer4.1.relu layer4.1.relu_1"),
        ("layer4*@BasicBlock", "layer4.0 layer4.1"),
        ("*@Sequential", "layer1 layer2 layer3 layer4"),
        ("@Sequential", "layer1 layer2.0.downsample layer2 layer3.0.downsample layer3 layer4.0.downsample layer4"),
        ("@*Pool2d", "maxpool avgpool"),
        ("@Linear", "fc"),
        ("@add", "layer1.0.add layer1.1.add layer2.0.add layer2.1.add layer3.0.add layer3.1.add layer4.0.add layer4.1.add"),
        ("*@flatten", "flatten"),
        # roles
        ("**#hidden", HIDDEN),
        ("#hidden", HIDDEN),
        ("*", HIDDEN),
        ("#input", "x"),
        ("*#input", "x"),
        ("#output", "fc"),
        ("layer4.**@ReLU#hidden", "layer4.0.relu layer4.0.relu_1 layer4.1.relu"),
        ("layer[12]#hidden", "layer1 layer2"),
        # ports
        ("layer4:out", "layer4"),
        ("layer4.*:out", "layer4.0 layer4.1"),
        ("layer4*@ReLU:out#hidden", "layer4.0.relu layer4.0.relu_1 layer4.1.relu"),
        ("fc:*", "fc"),
        # unions and what is taken away
        (["layer2", "layer1"], "layer1 layer2"),
        (["layer4.*", "layer4"], "layer4.0 layer4.1"),
        (["layer4.1.relu_1", "layer4.1", "layer4"], "layer4.1.relu_1"),
        (["layer4.*", "!layer4.1"], "layer4.0"),
        (["!layer4.1", "layer4.*"], "layer4.0"),
        (["layer4.**", "!@Conv2d", "!@BatchNorm2d", "!@add"], "layer4.0.relu layer4.0.relu_1 layer4.1.relu layer4.1.relu_1"),
        (["*", "!layer*"], HIDDEN.replace("layer1.1 ", "").replace("layer2.1 ", "").replace("layer3.1 ", "")),
        (["*", "!layer**"], "maxpool avgpool"),
        (["!layer**"], "maxpool avgpool"),
        ("!layer**", "maxpool avgpool"),
        (["*", "fc"], HIDDEN + " fc"),
        (("layer1", "fc"), "layer1 fc"),
        # white space around is none of the name
        (" layer4 ", "layer4"),
    ],
    ids=str,
)  # fmt: skip
def test_values(selector: Selector, names: str) -> None:
    assert found(RESNET, selector) == named(RESNET, names.split())


@pytest.mark.parametrize(
    ("selector", "count"), [("@Conv2d", 20), ("@BatchNorm2d", 20), ("@ReLU", 17), ("@BasicBlock", 8), ("**", 70), ("layer4.**", 16)]
)
def test_count(selector: str, count: int) -> None:
    assert len(found(RESNET, selector)) == count
    assert len(graphreg.plan(RESNET, BernoulliDropout(selector, 0.1, expect=count)).edits) == count


@pytest.mark.parametrize(
    ("predicate", "selector"),
    [
        (lambda site: site.op == "Conv2d", "@Conv2d"),
        (lambda site: site.role == "hidden", "*"),
        (lambda site: site.name.startswith("layer4."), "layer4.**"),
        (lambda site: site.module == "fc", "fc"),
        (lambda site: "layer4" in site.names, "layer4"),
        (lambda site: True, "**"),
    ],
    ids=["op", "role", "name", "module", "names", "all"],
)
def test_predicates(predicate: Callable[[Site], bool], selector: str) -> None:
    assert found(RESNET, predicate) == found(RESNET, selector)


def test_predicate_may_be_any_callable() -> None:
    class Late:
        def __call__(self, site: Site) -> bool:
            return site.name == "fc"

    assert found(RESNET, Late()) == named(RESNET, ["fc"])


def test_default_of_a_penalty_is_without_norms() -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.norm, self.b, self.act, self.c = nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.act(self.b(self.norm(self.a(x)))))

    traced = graphreg.trace(Normed())
    assert found(traced, "*", BernoulliDropout) == named(traced, ["norm", "act"])
    assert found(traced, "*", HiddenL1) == named(traced, ["act"])
    assert found(traced, "#hidden", HiddenL1) == named(traced, ["norm", "act"])


# Parameters

CONVS = [name for name, p in RESNET.model.named_parameters() if p.dim() == 4]


@pytest.mark.parametrize(
    ("selector", "names"),
    [
        ("*", [*CONVS, "fc.weight"]),
        ("*.weight", [*CONVS, "fc.weight"]),
        ("**", [*CONVS, "fc.weight"]),
        ("@Conv2d", CONVS),
        ("*@Linear", ["fc.weight"]),
        ("fc.*", ["fc.weight"]),
        ("layer1*", ["layer1.0.conv1.weight", "layer1.0.conv2.weight", "layer1.1.conv1.weight", "layer1.1.conv2.weight"]),
        ("layer1.*", ["layer1.0.conv1.weight", "layer1.0.conv2.weight", "layer1.1.conv1.weight", "layer1.1.conv2.weight"]),
        ("layer[12].1.conv?.weight", [f"layer{i}.1.conv{j}.weight" for i in (1, 2) for j in (1, 2)]),
        (["*.weight", "!layer*"], ["conv1.weight", "fc.weight"]),
        ("!layer*", ["conv1.weight", "fc.weight"]),
        (["fc.weight", "conv1.weight"], ["conv1.weight", "fc.weight"]),
    ],
    ids=str,
)
def test_parameters(selector: Selector, names: list[str]) -> None:
    assert len(CONVS) == 20
    assert [site.name for site in found(RESNET, selector, WeightL2)] == names


def test_predicate_on_parameters() -> None:
    sites = found(RESNET, lambda site: site.shape[0] == 10, WeightL2)
    assert [site.name for site in sites] == ["fc.weight"]


def test_parameters_of_a_recurrent_layer() -> None:
    traced = graphreg.trace(Recurrent())
    assert [s.name for s in found(traced, "rnn.*", WeightL2)] == ["rnn.weight_ih_l0", "rnn.weight_hh_l0"]
    assert [s.name for s in found(traced, "*_hh_*", WeightL2)] == ["rnn.weight_hh_l0"]


# Ports: a penalty of weight 1 is the mean of |value|, which tells what a selector found


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase] = nn.LSTM) -> None:
        super().__init__()
        self.rnn, self.head = kind(4, 5, batch_first=True), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.rnn, nn.LSTM):
            out, (h, c) = self.rnn(x)
            return self.head(out) + self.head(h[-1] * c[-1]).unsqueeze(1)
        out, h = self.rnn(x)
        return self.head(out) + self.head(h[-1]).unsqueeze(1)


class Indexed(Recurrent):
    """The same, its parts taken out one by one."""

    def forward(self, x: Tensor) -> Tensor:
        found = self.rnn(x)
        state = found[1]
        return self.head(found[0]) + self.head(state[0][-1] * state[1][-1]).unsqueeze(1)


class Parts(nn.Module):
    """Returns its two layers' values in the container of ``make``."""

    def __init__(self, make: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.a, self.b, self.make = nn.Linear(4, 4), nn.Linear(4, 4), make

    def forward(self, x: Tensor) -> Any:
        return self.make(self.a(x), self.b(x))


class Fields(NamedTuple):
    mean: Tensor
    scale: Tensor


@dataclass
class Data:
    logits: Tensor
    hidden: Tensor


class Holder(nn.Module):
    """Uses both values of ``Parts``, whatever they come in."""

    def __init__(self, make: Callable[[Tensor, Tensor], Any], take: Callable[[Any], tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.part, self.take, self.head = Parts(make), take, nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.take(self.part(x))
        return self.head(torch.tanh(left) * right)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.att, self.head = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, weights = self.att(x, x, x)
        return self.head(y), weights


class Chunked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.head = nn.Linear(4, 8), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.up(x).chunk(2, -1)
        return self.head(torch.tanh(left) * right)


class Unrolled(nn.Module):
    """A cell called three times."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.GRUCell(4, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.cell(x[:, 0])
        h = self.cell(x[:, 1], h)
        h = self.cell(x[:, 2], h)
        return self.head(h)


class LongCell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.LSTMCell(4, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        h, c = self.cell(x[:, 0])
        h, c = self.cell(x[:, 1], (h, c))
        return self.head(h * c)


def steps(m: Any, x: Tensor) -> list[Tensor]:
    first = m.cell(x[:, 0])
    second = m.cell(x[:, 1], first)
    return [first, second, m.cell(x[:, 2], second)]


def long_steps(m: Any, x: Tensor) -> list[Tensor]:
    first = m.cell(x[:, 0])
    return [*first, *m.cell(x[:, 1], first)]


def as_dict(left: Tensor, right: Tensor) -> Any:
    return {"left": left, "right": right}


def nested(left: Tensor, right: Tensor) -> Any:
    return {"deep": {"left": left}, "pair": (right, left)}


def both(m: Any, x: Tensor) -> list[Tensor]:
    return [m.part.a(x), m.part.b(x)]


def lstm(m: Any, x: Tensor) -> list[Tensor]:
    return [m.rnn(x)[0], *m.rnn(x)[1]]


def gru(m: Any, x: Tensor) -> list[Tensor]:
    return list(m.rnn(x))


def attended(m: Any, x: Tensor) -> list[Tensor]:
    return list(m.att(x, x, x))


def chunks(m: Any, x: Tensor) -> list[Tensor]:
    return list(m.up(x).chunk(2, -1))


DICT = partial(Holder, as_dict, lambda d: (d["left"], d["right"]))
NESTED = partial(Holder, nested, lambda d: (d["deep"]["left"], d["pair"][0]))
FIELDS = partial(Holder, Fields, lambda f: (f.mean, f.scale))
DATA = partial(Holder, Data, lambda d: (d.logits, d.hidden))
TUPLE = partial(Holder, lambda left, right: (left, right), lambda t: t)


@cache
def with_trace(make: Callable[[], nn.Module]) -> tuple[nn.Module, Traced]:
    torch.manual_seed(0)
    model = make()
    return model, graphreg.trace(model)


@pytest.mark.parametrize(
    ("make", "selector", "values", "which"),
    [
        *[
            (make, selector, lstm, which)
            for make in (Recurrent, Indexed)
            for selector, which in [
                ("rnn", [0]), ("rnn:out", [0]), ("rnn:0", [0]), ("rnn:h_n", [1]), ("rnn:c_n", [2]), ("rnn:*", [0, 1, 2]),
                ("rnn:?_n", [1, 2]), ("rnn*:h_n", [1]), ("@LSTM", [0]), ("@LSTM:c_n", [2]),
                (["rnn:*", "!rnn"], [1, 2]), (["rnn", "rnn:out", "rnn:h_n"], [0, 1]),
            ]
        ],
        *[
            (partial(Recurrent, kind), selector, gru, which)
            for kind in (nn.GRU, nn.RNN)
            for selector, which in [("rnn", [0]), ("rnn:out", [0]), ("rnn:h_n", [1]), ("rnn:*", [0, 1])]
        ],
        (DICT, "part:left", both, [0]),
        (DICT, "part:right", both, [1]),
        (DICT, "part:*", both, [0, 1]),
        (DICT, "@Parts:r*", both, [1]),
        (DICT, "part.*", both, [0, 1]),
        (DICT, ["part:*", "part.a"], both, [0, 1]),
        (NESTED, "part:deep.left", both, [0]),
        (NESTED, "part:pair.0", both, [1]),
        (NESTED, "part:pair.1", both, [0]),
        (FIELDS, "part:mean", both, [0]),
        (FIELDS, "part:scale", both, [1]),
        (DATA, "part:logits", both, [0]),
        (DATA, "part:hidden", both, [1]),
        (TUPLE, "part:0", both, [0]),
        (TUPLE, "part:1", both, [1]),
        (TUPLE, "part", both, [0]),
        (TUPLE, "part:[01]", both, [0, 1]),
        (Attention, "att", attended, [0]),
        (Attention, "att:out", attended, [0]),
        (Attention, "att:0", attended, [0]),
        (Attention, "att:1", attended, [1]),
        (Attention, "@MultiheadAttention", attended, [0]),
        (Chunked, "chunk:0", chunks, [0]),
        (Chunked, "chunk:1", chunks, [1]),
        (Chunked, "@chunk:1", chunks, [1]),
        (Unrolled, "cell", steps, [0]),
        (Unrolled, "cell:out", steps, [0]),
        (Unrolled, "cell_1", steps, [1]),
        (Unrolled, "cell_2", steps, [2]),
        (Unrolled, "cell*", steps, [0, 1, 2]),
        (Unrolled, "cell_[12]", steps, [1, 2]),
        (Unrolled, "@GRUCell", steps, [0, 1, 2]),
        (Unrolled, ["cell*", "!cell"], steps, [1, 2]),
        (LongCell, "cell", long_steps, [0]),
        (LongCell, "cell:1", long_steps, [1]),
        (LongCell, "cell_1", long_steps, [2]),
        (LongCell, "cell_1:1", long_steps, [3]),
        (LongCell, "cell*", long_steps, [0, 2]),
        (LongCell, "cell*:1", long_steps, [1, 3]),
    ],
    ids=lambda value: str(value) if isinstance(value, (str, list)) else getattr(value, "__name__", ""),
)  # fmt: skip
def test_ports(make: Callable[[], nn.Module], selector: Selector, values: Callable[[Any, Tensor], list[Tensor]], which: list[int]) -> None:
    (model, traced), x = with_trace(make), torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    module = graphreg.rewrite(traced, graphreg.plan(traced, [HiddenL1(selector, 1.0, expect=len(which))]), rng=0)
    with torch.no_grad():
        expected = torch.stack([values(model, x)[i].abs().mean() for i in which]).mean()
        assert torch.allclose(module(x).penalties["hidden_l1"], expected)


def test_ports_are_named_in_the_listing() -> None:
    def listed(model: nn.Module) -> set[str]:
        return set(graphreg.names(model))

    assert {"rnn", "rnn:h_n", "rnn:c_n"} <= listed(Recurrent())
    assert {"part:left", "part:right"} <= listed(DICT())
    assert {"part:mean", "part:scale"} <= listed(FIELDS())
    assert {"part:logits", "part:hidden"} <= listed(DATA())
    assert {"att", "att:1"} <= listed(Attention())
    assert {"chunk:0", "chunk:1"} <= listed(Chunked())
    assert {"cell", "cell_1", "cell_2"} <= listed(Unrolled())


# Names of a module called several times, and of modules whose names look counted


class Counted(nn.Module):
    """``fc`` called twice beside a layer ``fc_1``; a layer ``relu`` beside the function."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.fc_1, self.relu, self.block = nn.Linear(4, 4), nn.Linear(4, 3), nn.ReLU(), nn.Sequential(nn.Linear(4, 4), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.fc(self.fc(x)))
        y = self.block(self.block(self.relu(y)))
        return self.fc_1(y)


@pytest.mark.parametrize(
    ("selector", "names"),
    [
        ("fc", "fc"),
        ("fc_1", "fc_1"),
        ("fc_2", "fc_2"),
        ("fc*", "fc fc_2 fc_1"),
        ("relu", "relu"),
        ("@relu", "relu_1"),
        ("@ReLU", "relu"),
        ("block", "block"),
        ("block_1", "block_1"),
        ("block*", "block block_1"),
        ("block.*", "block.0 block.1 block.0_1 block.1_1"),
        ("block**", "block.0 block.1 block.0_1 block.1_1"),
        ("block.0*", "block.0 block.0_1"),
        ("@Sequential", "block block_1"),
    ],
)
def test_repeated_calls(selector: str, names: str) -> None:
    traced = graphreg.trace(Counted())
    sites = found(traced, selector)
    assert sites == named(traced, names.split())
    assert {site.module for site in named(traced, ["fc", "fc_2"])} == {"fc"} and named(traced, ["fc_1"])[0].module == "fc_1"
    assert named(traced, ["block", "block_1"]) == named(traced, ["block.1", "block.1_1"])


def test_an_input_is_called_as_its_argument() -> None:
    """Also where the argument has a builtin's name, as in every ``nn.Sequential``; torchvision calls it so, too."""
    traced = graphreg.trace(nn.Sequential(nn.Linear(4, 2)))
    assert [site.name for site in found(traced, "#input")] == ["input"]
    assert [site.name for site in found(traced, "input")] == ["input"]


# What is listed and never selected


class Unusable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(7, 4), nn.Linear(4, 2)
        self.gain = nn.Parameter(torch.ones(4, 4))

    def forward(self, tokens: Tensor, x: Tensor) -> Tensor:
        rows = x.size(0)
        mask = x > 0
        parts = x.chunk(2, -1)
        z = self.embed(tokens).view(rows, -1) + parts[0] @ self.gain + parts[1] * mask.float()[:, :4]
        return self.head(z)


@pytest.mark.parametrize(
    ("selector", "why"), [("tokens", "integers"), ("size", "no tensor"), ("gt", "integers"), ("gain", "a parameter"), ("chunk", "a tuple")]
)
def test_never_selected(selector: str, why: str) -> None:
    traced = graphreg.trace(Unusable())
    assert selector in [name for site in traced.values for name in site.names]
    with pytest.raises(NoMatchError, match=rf"'{selector}' matches no value.*cannot be regularized: {selector} \({why}\)"):
        found(traced, selector)
    everything = found(traced, "**")
    assert not {selector} & {name for site in everything for name in site.names}
    assert found(traced, "#input") == named(traced, ["x"])


MODELS: dict[str, Callable[[], nn.Module]] = {
    "resnet18": lambda: RESNET.model, "recurrent": Recurrent, "indexed": Indexed, "dict": DICT, "nested": NESTED, "fields": FIELDS,
    "data": DATA, "tuple": TUPLE, "attention": Attention, "chunked": Chunked, "unrolled": Unrolled, "long_cell": LongCell,
    "counted": Counted, "unusable": Unusable,
}  # fmt: skip


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_every_listed_name_selects_its_site(make: Callable[[], nn.Module]) -> None:
    """All that graphreg.names lists can be written as a selector; with ``:out`` where no port is written, too."""
    traced = graphreg.trace(make())
    names = [name for site in traced.values for name in site.names]
    assert len(names) == len(set(names)), "a name for two sites"
    for site in traced.values:
        for name in site.names:
            spellings = [name] if ":" in name.replace(":out", "") else [name.removesuffix(":out"), name.removesuffix(":out") + ":out"]
            for selector in spellings:
                if site.selectable:
                    assert found(traced, selector) == [site], selector
                else:
                    with pytest.raises(NoMatchError, match="matches no value"):
                        found(traced, selector)


def test_selectors_do_not_see_what_regularizers_add() -> None:
    model = RESNET.model
    both = graphreg.plan(RESNET, [BernoulliDropout("**", 0.1), BernoulliDropout("**", 0.2), HiddenL1("**", 0.1)])
    counts = [len(both.of(name)) for name in both.regularizers]
    assert counts == [70, 70, 70]
    stripped = graphreg.strip(regularize(model, hidden_dropout=0.1, hidden_l1=0.1, rng=0))
    assert list(graphreg.names(stripped)) == list(graphreg.names(model))
    assert found(graphreg.trace(stripped), "**") == found(RESNET, "**")


# Equivalent spellings

VALUES = [name for site in RESNET.values if site.selectable for name in site.names]
GLOBS = ["layer4*", "layer4.*", "layer4.**", "layer?.0", "*.relu", "@Conv2d", "#hidden", "*", "layer[12]*", "@add", "**bn*", "*#output"]
texts = st.sampled_from([*VALUES, *GLOBS])
unions = st.lists(texts, min_size=1, max_size=4)


def or_nothing(selector: Selector) -> list[Site]:
    try:
        return found(RESNET, selector)
    except NoMatchError as error:
        assert "leaves no value" in str(error)
        return []


@given(unions, st.lists(texts, max_size=2), st.randoms(use_true_random=False))
def test_order_of_a_union(union: list[str], less: list[str], random: Any) -> None:
    given = [*union, *(f"!{text}" for text in less)]
    shuffled = random.sample(given, len(given))
    assert or_nothing(given) == or_nothing(shuffled)


@given(texts)
def test_one_string_is_a_list_of_one(text: str) -> None:
    assert found(RESNET, text) == found(RESNET, [text]) == found(RESNET, (text,))
    assert BernoulliDropout(text, 0.1) == BernoulliDropout([text], 0.1)


@given(st.sampled_from([text for text in [*VALUES, *GLOBS] if "#" not in text and text != "*"]))
def test_out_is_the_default_port(text: str) -> None:
    assert found(RESNET, text) == found(RESNET, f"{text}:out")


@given(texts)
def test_no_name_is_any_name(text: str) -> None:
    assume(text != "*")
    _, at, op = text.partition("@")
    if at:
        assert found(RESNET, f"@{op}") == found(RESNET, f"**@{op}")
    assert found(RESNET, "#hidden") == found(RESNET, "**#hidden")


@given(unions, st.data())
def test_a_union_with_a_duplicate(union: list[str], data: Any) -> None:
    again = data.draw(st.sampled_from(union))
    assert found(RESNET, [*union, again]) == found(RESNET, union)


@given(unions)
def test_a_union_is_the_union(union: list[str]) -> None:
    sites = found(RESNET, union)
    each = {site.name for text in union for site in found(RESNET, text)}
    assert {site.name for site in sites} == each
    assert len(sites) == len(each), "a site is counted once"
    order = [site.name for site in RESNET.values]
    assert [order.index(site.name) for site in sites] == sorted(order.index(site.name) for site in sites)


@given(unions, texts)
@example(["fc"], "*")
@example(["fc", "layer4.*"], "layer4*")
def test_what_is_taken_away_is_gone(union: list[str], text: str) -> None:
    gone = {site.name for site in found(RESNET, text)}
    assert or_nothing([*union, text, f"!{text}"]) == [site for site in found(RESNET, union) if site.name not in gone]
    assert or_nothing([text, f"!{text}"]) == []


@given(texts)
def test_an_exclude_alone_starts_from_the_default(text: str) -> None:
    assert or_nothing(f"!{text}") == or_nothing(["*", f"!{text}"])


@given(st.sampled_from(VALUES), st.data())
@example("layer4.0.relu_1", None)
def test_a_star_in_a_name_still_finds_something(name: str, data: Any) -> None:
    start = data.draw(st.integers(0, len(name))) if data else 0
    end = data.draw(st.integers(start, len(name))) if data else 3
    pattern = f"{name[:start]}*{name[end:]}"
    assume(pattern != "*")
    named_once, within = found(RESNET, pattern), found(RESNET, pattern.replace("*", "**"))
    assert named_once
    assert {s.name for s in named_once} <= {s.name for s in within}
    assert named(RESNET, [name])[0] in within


@cache
def measured() -> Traced:
    torch.manual_seed(0)
    return graphreg.trace(
        nn.Sequential(OrderedDict(hid1=nn.Linear(4, 6), act1=nn.Tanh(), hid2=nn.Linear(6, 5), act2=nn.Tanh(), out=nn.Linear(5, 2)))
    )


@settings(max_examples=30)
@given(st.lists(st.sampled_from(["hid1", "act1", "hid2", "*", "hid*", "act1:out", "@Tanh"]), min_size=1, max_size=5))
def test_a_site_is_measured_once(union: list[str]) -> None:
    """However many patterns match it: the penalty is the mean over the distinct sites."""
    traced = measured()
    meaning = {"hid1": {"hid1"}, "act1": {"act1"}, "hid2": {"hid2"}, "*": {"act1", "act2"}, "hid*": {"hid1", "hid2"},
               "act1:out": {"act1"}, "@Tanh": {"act1", "act2"}}  # fmt: skip
    wanted = set().union(*(meaning[text] for text in union))
    x = torch.randn(3, 4)
    with torch.no_grad():
        values, y = {}, x
        for name, layer in traced.model.named_children():
            values[name] = y = layer(y)
        expected = torch.stack([values[name].abs().mean() for name in sorted(wanted)]).mean()
        penalty = graphreg.rewrite(traced, graphreg.plan(traced, HiddenL1(union, 1.0)))(x).penalties["hidden_l1"]
    assert torch.allclose(penalty, expected)


# Names that mean something to a selector, and what needs not be taken away


class Odd(nn.Module):
    """Modules are called as their configuration calls them."""

    names = ("conv@3", "conv@3:bn", "#head", "!not", "a*b", "axb", "q?", "[0]", " spaced ")

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({name: nn.Linear(4, 4) for name in self.names})
        self.tuple = nn.ModuleDict({"rnn@1": nn.GRU(4, 4)})

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts.values():
            x = torch.tanh(part(x))
        out, last = self.tuple["rnn@1"](x)
        return out + last


ODD = graphreg.trace(Odd())


@pytest.mark.parametrize("name", Odd.names)
def test_any_name_can_be_selected(name: str) -> None:
    """What the error proposes for a name finds that module and its parameters, and nothing else."""
    site = next(site for site in ODD.values if site.name == f"parts.{name}")
    exact = exactly(site.labels[0])
    assert found(ODD, exact) == [site]
    assert [s.name for s in found(ODD, f"{exact}.weight", WeightL2)] == [f"parts.{name}.weight"]
    assert [s.name for s in found(ODD, ["parts.*.weight", f"!{exact}.*"], WeightL2)] == [
        f"parts.{other}.weight" for other in Odd.names if other != name
    ]
    assert found(ODD, exact.replace("parts", "p*")) == [site]


@pytest.mark.parametrize("site", [site for site in ODD.sites if site.selectable and "norm" not in site.name], ids=lambda site: site.name)
def test_what_means_a_site_exactly_finds_it(site: Site) -> None:
    kind = WeightL2 if site.kind == "parameter" else HiddenL1
    if site.kind == "value" or len(site.shape or ()) > 1:
        assert [found(ODD, exactly(label), kind) for label in site.labels] == [[site]] * len(site.labels)


@pytest.mark.parametrize(("selector", "proposed"), [
    ("parts.conv@3", r"parts.conv\@3"), ("parts.conv@3:bn", r"parts.conv\@3\:bn"), ("parts.#head", r"write \#"),
    ("parts.[0]", r"parts.\[0]"), ("parts.q", r"parts.q\?"), ("parts.q@", r"\@"),
    (r"parts.conv\@4", r"parts.conv\@3"), ("tuple.rnn@2", r"tuple.rnn\@1"),
    (r"tuple.rnn\@1:c_n", "out"), ("tuple.rnn@1:h_n", r"tuple.rnn\@1"),
])  # fmt: skip
def test_the_error_proposes_what_can_be_written(selector: str, proposed: str) -> None:
    with pytest.raises(graphreg.GraphRegError) as refused:
        found(ODD, selector)
    assert proposed in str(refused.value)


def test_a_name_that_asks_for_something_else_is_proposed_first() -> None:
    with pytest.raises(
        NoMatchError, match=r"^'parts\.conv@3' matches no value of Odd\. A site has that very name: write parts\.conv\\@3 \(in "
    ):
        found(ODD, "parts.conv@3")


def test_a_state_at_an_odd_name_is_proposed_as_it_is_written() -> None:
    with pytest.raises(
        graphreg.RegularizerError, match=re.escape(r"Select 'tuple.rnn\@1:out'; if a glob matches both, add '!tuple.rnn\@1:h_n'")
    ):
        regularize(Odd(), recurrent_state={"weight": 1.0, "pattern": r"tuple.rnn\@1:*"})
    regularize(Odd(), recurrent_state={"weight": 1.0, "pattern": [r"tuple.rnn\@1:*", r"!tuple.rnn\@1:h_n"]})


def test_a_backslash_at_the_end_is_no_selector() -> None:
    with pytest.raises(
        graphreg.RegularizerError, match=r"is no selector\..* A backslash makes the next character part of the name"
    ):
        found(RESNET, "fc\\")


@pytest.mark.parametrize(("selector", "cls", "names"), [
    (["fc.*", "!fc.bias"], WeightL2, ["fc.weight"]),  # of too few dims
    (["fc.*", "!*.bias", "!bn1.*"], WeightL2, ["fc.weight"]),
    (["fc.*", "!layer1", "!**@ReLU"], WeightL2, ["fc.weight"]),  # values
    (["fc", "!fc.weight", "!fc.bias"], BernoulliDropout, ["fc"]),  # parameters
    (["!*.bias", "!layer*"], WeightL2, ["conv1.weight", "fc.weight"]),
    (["fc", "!fc"], BernoulliDropout, None), (["fc.*", "!fc.bais"], WeightL2, None), (["fc.*", "!fc.bias@ReLU"], WeightL2, None),
    (["fc.*", "!fc.bias:1"], WeightL2, None), (["fc.bias"], WeightL2, None), (["fc.*", "fc.bias"], WeightL2, None),
])  # fmt: skip
def test_what_is_there_may_be_excluded(selector: list[str], cls: Any, names: list[str] | None) -> None:
    if names is None:
        with pytest.raises(NoMatchError):
            found(RESNET, selector, cls)
        return
    assert [site.name for site in found(RESNET, selector, cls)] == names
    with pytest.warns(UserWarning, match="'!nowhere' matches no") as given:
        plan = graphreg.plan(RESNET, cls([*selector, "!nowhere"], 0.1, name="one"), missing="warn")
    assert len(given) == 1 and plan.missed == {"one": ("!nowhere",)} and [edit.site.name for edit in plan.edits] == names


def test_own_dropout_may_exclude_what_is_no_dropout() -> None:
    model = nn.Sequential(OrderedDict(a=nn.Linear(2, 2), drop=nn.Dropout(), b=nn.Linear(2, 2), other=nn.Dropout()))
    plan = graphreg.plan(graphreg.trace(model), [], own_dropout={("*", "!b", "!other"): 0.1})
    assert [edit.dropout.site.name for edit in plan.native_dropout] == ["drop"]
    with pytest.raises(NoMatchError, match="'!c'"):
        graphreg.plan(graphreg.trace(model), [], own_dropout={("*", "!c"): 0.1})


def test_exclusions_alone_need_default_sites() -> None:
    """Nothing is left to take from: an error, and no regularizer that acts nowhere."""
    with pytest.raises(NoMatchError, match="has none of the default sites of HiddenL1"):
        found(graphreg.trace(nn.Sequential(nn.Linear(2, 2), nn.Tanh())), "!0", HiddenL1)
