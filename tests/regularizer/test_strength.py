"""``strength`` and ``weight`` are two names of one option, wherever options are given."""

from __future__ import annotations

import copy
import json
import pickle
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphreg
from graphreg import Penalty, RegularizerError, by_depth, schedules
from graphreg.cli.keywords import regularizers as of_command
from graphreg.passes import BernoulliDropout, Contractive, HiddenL1, MaxNorm, WeightL2
from graphreg.testing import check_regularizer


def net() -> nn.Sequential:
    return nn.Sequential(OrderedDict(hid=nn.Linear(4, 6), act=nn.Tanh(), out=nn.Linear(6, 2)))


def one(regularizers: list[Any]) -> Any:
    (only,) = regularizers
    return replace(only, name=None)


WANTED = WeightL2("hid.*", 0.25, reduction="sum")
OPTIONS = {"strength": 0.25, "pattern": "hid.*", "reduction": "sum"}
WAYS: dict[str, Callable[[Path], Any]] = {
    "instance": lambda folder: WeightL2(**OPTIONS),
    "build": lambda folder: graphreg.build("weight_l2", **OPTIONS),
    "dict of options": lambda folder: one(graphreg.from_kwargs(net(), weight_l2=OPTIONS)),
    "dict of selectors": lambda folder: one(graphreg.from_kwargs(net(), weight_l2={"hid.*": {"strength": 0.25, "reduction": "sum"}})),
    "command line": lambda folder: one(of_command(graphreg.trace(net()), [("--weight-l2", json.dumps(OPTIONS))])),
    "recipe": lambda folder: of_recipe({"regularizers": [{"key": "weight_l2", **OPTIONS}]}),
    "recipe's keyword": lambda folder: of_recipe({"weight_l2": OPTIONS}),
    "recipe's file": lambda folder: of_recipe(
        written(folder / "recipe.toml", '[weight_l2]\nstrength = 0.25\npattern = "hid.*"\nreduction = "sum"')
    ),
    "backend": lambda folder: one(list(graphreg.backend(inner="eager", weight_l2=OPTIONS).regularizers.values())),
    "pass": lambda folder: asked(graphreg.as_pass(weight_l2=OPTIONS)(torch.fx.symbolic_trace(net())).graph_module),
    "in place": lambda folder: asked(graphreg.regularize_(net(), weight_l2=OPTIONS)),
    "pickle": lambda folder: pickle.loads(pickle.dumps(copy.deepcopy(WeightL2(**OPTIONS)))),
}


def asked(module: Any) -> Any:
    return of_recipe(graphreg.recipe(module))


def of_recipe(recipe: Any) -> Any:
    (only,) = graphreg.plan(graphreg.trace(net()), recipe=recipe).regularizers.values()
    return replace(only, name=None)


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.mark.parametrize("way", WAYS)
def test_every_way_takes_it(way: str, tmp_path: Path) -> None:
    assert WAYS[way](tmp_path) == WANTED


@pytest.mark.parametrize("strength", [schedules.linear(0, 0.5, 10), by_depth(0, 0.2), {"linear": [0, 0.5, 10]}, torch.tensor(0.25)])
def test_it_takes_what_weight_takes(strength: Any) -> None:
    made = BernoulliDropout("*", strength=strength)
    assert made == BernoulliDropout("*", weight=strength) and made.strength == made.weight
    assert "strength" not in made.to_dict() and repr(made) == repr(BernoulliDropout("*", strength))


def test_nothing_else_depends_on_the_name() -> None:
    """The masks, the code, the recipe and the plan are the same."""
    x, found = torch.ones(3, 4), []
    torch.manual_seed(0)
    model = net()
    for name in ("weight", "strength"):
        module = graphreg.regularize(model, hidden_dropout={name: 0.5}, hidden_l1={name: 0.1, "pattern": "act"}, rng=0)
        result, recipe = module(x), graphreg.recipe(module)
        plan = str(graphreg.plan(graphreg.trace(model), recipe=recipe))
        found.append((result.output.tolist(), result.penalties["hidden_l1"].item(), module.code, recipe, plan))
    assert found[0] == found[1]
    assert found[0][3]["regularizers"][0]["weight"] == 0.5  # a recipe has the name that 0.2 reads


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: WeightL2("*", weight=0.1, strength=0.2), "WeightL2: strength=0.2 and weight=0.1 are two names of one option. Give one of"),
        (lambda: WeightL2("*", 0.1, strength=0.1), "WeightL2: strength=0.1 and weight=0.1 are two names of one option."),
        (
            lambda: graphreg.regularize(net(), hidden_l1={"strength": 0.1, "weight": 0.1}),
            "HiddenL1: strength=0.1 and weight=0.1 are two names of one option.",
        ),
        (lambda: replace(WeightL2("*", 0.1), strength=0.2), "WeightL2: strength=0.2 and weight=0.1 are two names of one option."),
        (lambda: BernoulliDropout("*", strength=1.5), "BernoulliDropout: strength=1.5 is not allowed; strength must be in [0, 1)."),
        (
            lambda: BernoulliDropout("*", strength=1 - 2**-25),  # the largest rate below is 1 - 2**-24
            "BernoulliDropout: strength=0.9999999701976776 is not allowed; strength must be in [0, 1). In float32, which formulas use, it ",
        ),
        (
            lambda: BernoulliDropout("*", schedules.linear(0, 0.99999999, 4)),
            "In float32, which formulas use, it is 1.0. The schedule linear(0, 0.99999999, 4) has this number.",
        ),
        (
            lambda: graphreg.set_strength(graphreg.regularize(net(), hidden_dropout=0.5), "hidden_dropout", 0.99999999),
            "weight=0.99999999 is not allowed; weight must be in [0, 1). In float32",
        ),
        (
            lambda: graphreg.regularize(net(), own_dropout=0.99999999),
            "own_dropout=0.99999999 is not allowed; it is 'keep', 'seeded', 'off', or a rate in [0, 1), for all or by selector: "
            "own_dropout={'layer4.*': 'off'}. In float32, this rate is 1.",
        ),
        (lambda: HiddenL1("*", strength=-1), "HiddenL1: strength=-1.0 is not allowed; strength must be 0 or more."),
        (lambda: HiddenL1("*", strength="much"), "HiddenL1: strength is 'much'; it must be a finite number. Write HiddenL1('*'"),
        (
            lambda: BernoulliDropout("*", strength=by_depth(0, schedules.linear(0, 1, 4))),
            "BernoulliDropout: strength=1.0 is not allowed; strength must be in [0, 1). The schedule by_depth(0, linear(0, 1, 4)) has",
        ),
        (lambda: Contractive("*", strength=by_depth(0, 1)), "Contractive: strength=by_depth(0, 1) is not allowed, because the formula"),
        (lambda: MaxNorm("*", strength=0.1), "Write MaxNorm('*', 0.1, limit=...), or max_norm={'strength': 0.1, 'limit': ...}."),
        (lambda: WeightL2("*", strengh=0.1), "WeightL2 has no option 'strengh'. Near options: strength, weight,"),
        (
            lambda: graphreg.regularize(net(), weight_l2={"strength": "x"}),
            "WeightL2: strength is 'x'; it must be a finite number. Write weight_l2={'strength': 0.1, ...}.",
        ),
        (lambda: graphreg.regularize(net(), weight_l2={"reduction": "sum"}), "has no 'strength'; write weight_l2={'strength': 0.1, ...}"),
        (
            lambda: of_recipe({"regularizers": [{"key": "dropout", "pattern": "act", "strength": 2}]}),
            "the recipe, at regularizers[0].strength: BernoulliDropout: strength=2.0 is not allowed",
        ),
        (
            lambda: of_recipe({"regularizers": [{"key": "weight_l2", "strength": 0.1, "reduction": "total"}]}),
            "the recipe, at regularizers[0].reduction: WeightL2: reduction='total' is not allowed",
        ),
    ],
)  # fmt: skip
def test_errors_name_what_was_written(make: Callable[[], object], message: str) -> None:
    with pytest.raises(RegularizerError) as caught:
        make()
    assert message in str(caught.value)


def test_the_greatest_rate_of_float32_and_a_number_near_1_that_is_no_rate() -> None:
    module = graphreg.regularize(nn.Sequential(nn.Identity()), dropout={"0": 1 - 2**-24}, rng=0)
    assert not module(torch.ones(9))[0].any()
    assert HiddenL1("*", 0.99999999).weight == 0.99999999


def test_an_option_of_that_name_stays_the_classs_own() -> None:
    class Own(Penalty):
        strength: float = 2.0

        def __call__(self, z: Tensor) -> Tensor:
            return z.abs().mean() * self.strength

    made = Own("act", 0.5, strength=3.0)
    assert (made.weight, made.strength) == (0.5, 3.0)
    assert Own("act", weight=0.5).strength == 2.0
    with pytest.raises(RegularizerError, match=r"Own: weight was not given"):
        Own("act", strength=3.0)


def test_a_subclass_takes_it_too() -> None:
    class Third(WeightL2):
        power: int = 3

        def __call__(self, w: Tensor) -> Tensor:
            return w.abs().pow(self.power).mean()

    assert Third("hid.*", strength=0.25) == Third("hid.*", 0.25)


def test_check_regularizer_takes_it() -> None:
    check_regularizer(WeightL2, strength=0.25, wrong={"strength": [-1.0]}, backend=None, gradients=False)
    with pytest.raises(RegularizerError, match=r"check_regularizer: strength=0\.1 and weight=0\.2 are two names of one option"):
        check_regularizer(WeightL2, weight=0.2, strength=0.1)
    with pytest.raises(AssertionError, match=r"WeightL2: strength=0\.5 is accepted"):
        check_regularizer(WeightL2, wrong={"strength": [0.5]})
