"""Where dropout and noise do known harm: the lines of plan, report, log, backend and page, and the selector that ends them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphreg
from browser import Page, needs_chromium
from graphreg import regularize, schedules
from graphreg.types import Site

X = torch.randn(8, 4)
BEFORE_NORM = (
    ": the input of the batch norm has a larger variance in train mode only, so the running variance does not fit eval mode (Li et al., "
    "CVPR 2019). '!#normed' in the selector leaves these sites out"
)
ON_TRUNK = (
    ": every later block gets what one site drops or adds, so the drops compound with depth (He et al., ECCV 2016). '!#trunk' in the "
    "selector leaves these sites out"
)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.bn1, self.two, self.bn2 = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.bn2(self.two(F.relu(self.bn1(self.one(x))))))


class Net(nn.Module):
    """Hidden are ``stem``, and of each block the inner ReLU and its output. That of the last one is the input of ``head``."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.blocks, self.head = nn.Linear(4, 4), nn.Sequential(Block(), Block()), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.blocks(self.stem(x)))
        return y


def lines(**keywords: Any) -> list[str]:
    plan = graphreg.plan(graphreg.trace(net := Net()), graphreg.from_kwargs(net, **keywords))
    assert all(line in str(plan) for line in plan.harms())
    return plan.harms()


def test_a_line_a_kind() -> None:
    assert lines(hidden_dropout=0.1) == [
        "before batch norm: hidden_dropout at 2 of 5 sites (blocks.0.relu, blocks.1.relu)" + BEFORE_NORM,
        "on the trunk: hidden_dropout at 2 of 5 sites (stem, blocks.0.relu_1)" + ON_TRUNK,
    ]
    # of several together; each drops once, but the trunk is one
    assert lines(dropout={"stem": 0.1}, noise={"blocks.0": 0.1, "blocks.0.relu": 0.1}) == [
        "before batch norm: noise_1 at 1 of 1 sites (blocks.0.relu)" + BEFORE_NORM,
        "on the trunk: dropout at 1 of 1 sites, noise at 1 of 1 sites (stem, blocks.0.relu_1)" + ON_TRUNK,
    ]


@pytest.mark.parametrize(
    "keywords",
    [
        {"dropout": {("!#normed", "!#trunk"): 0.1}},
        {"dropout": {"stem": 0.1, "blocks.1": 0.1}},  # one of the trunk: nothing compounds
        {"dropout": {"blocks.*.relu": 0.0}},
        {"alpha_dropout": 0.1, "drop_path": 0.1, "hidden_l1": 0.1, "weight_noise": 0.1},
    ],
)
def test_what_does_no_known_harm(keywords: dict[str, Any]) -> None:
    assert lines(**keywords) == []


def test_one_selector_for_models_with_and_without_the_marks() -> None:
    pattern = ["**#hidden", "!#normed", "!#trunk", "!**@Linear#output"]
    plain = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    left = {}
    for model in (Net(), plain):
        module = regularize(model, graphreg.build("dropout", weight=0.1, pattern=pattern))
        left[type(model).__name__] = [site.name for site in graphreg.report(module).sites]
    assert left == {"Net": ["blocks.1.relu_1"], "Sequential": ["1"]}
    with pytest.raises(graphreg.NoMatchError, match=r"'!blocks.\*\*#normed' matches no value of Sequential"):
        regularize(plain, graphreg.build("dropout", weight=0.1, pattern=["**#hidden", "!blocks.**#normed"]))
    with pytest.raises(graphreg.NoMatchError, match=r"'#normed' matches no value of Sequential.* roles hidden, input, output\."):
        regularize(plain, graphreg.build("dropout", weight=0.1, pattern="#normed"))
    # as a function of a site
    module = regularize(Net(), graphreg.build("dropout", weight=0.1, pattern=lambda site: site.role == "hidden" and not site.marks))
    assert [site.name for site in graphreg.report(module).sites] == ["blocks.1.relu_1"]
    assert Site.marks.__doc__


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The lines that the logger is asked to warn with."""
    lines: list[str] = []
    monkeypatch.setattr(logging.getLogger("graphreg"), "warning", lambda text, *args: lines.append(text % args))
    return lines


def told(module: Any) -> list[str]:
    return [note for note in graphreg.report(module).notes if note.startswith(("before batch norm", "on the trunk"))]


def test_report_and_log(log: list[str]) -> None:
    expected = lines(hidden_dropout=0.1)
    module = regularize(Net(), hidden_dropout=0.1)
    in_place = graphreg.regularize_(Net(), hidden_dropout=0.1, example_inputs=X)
    assert log == expected * 2
    assert told(module) == told(in_place) == expected
    graphreg.set_strength(module, "hidden_dropout", 0.0)
    assert told(module) == []
    # off at first, and not for good
    assert len(told(regularize(Net(), hidden_dropout=schedules.linear(0.0, 0.1, 9)))) == 2


def test_of_a_backend(log: list[str]) -> None:
    compiled = torch.compile(Net(), backend=graphreg.backend(hidden_dropout=0.1, inner="eager"))
    compiled(X)
    assert told(compiled) == log == lines(hidden_dropout=0.1)


@needs_chromium
def test_on_the_page(tmp_path: Path) -> None:
    net = Net()
    page = Page(graphreg.draw(regularize(net, hidden_dropout=0.1), tmp_path / "net.html"))
    items = "return [...document.querySelectorAll('#{} li')].map((item) => item.textContent)"
    assert page.run(items.format("harms")) == lines(hidden_dropout=0.1)
    page.type("selector", "**#hidden")
    assert page.run(items.format("harm")) == [f"before batch norm: 2 of 5 sites{BEFORE_NORM}", f"on the trunk: 2 of 5 sites{ON_TRUNK}"]
    page.type("selector", " !#normed !#trunk")
    assert page.run(items.format("harm")) == [] and page.text("count") == "1 site"


def test_the_shift_itself() -> None:
    """What the lines say: the spread of the output, in train mode and in eval mode after training calls, with the sites and without."""
    torch.manual_seed(0)
    ratios = {}
    for pattern in ("*", ("!#normed", "!#trunk")):
        module = regularize(nn.Sequential(nn.Linear(64, 64), *(Wide() for _ in range(6)), nn.Linear(64, 4)), rng=0, dropout={pattern: 0.3})
        with torch.no_grad():
            for _ in range(40):
                module(torch.randn(128, 64))  # for the running variances
            train, evaluated = (module.train(mode)(torch.randn(1024, 64)).output.square().mean().sqrt() for mode in (True, False))
        ratios[pattern] = float(train / evaluated)
    # without them, what is left is the noise of one dropout, at the input of the last layer
    assert ratios["*"] > 2 and ratios["!#normed", "!#trunk"] < 1.4


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin, self.bn = nn.Linear(64, 64), nn.BatchNorm1d(64)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.bn(self.lin(x))
        return y
