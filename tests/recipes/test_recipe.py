"""Recipes: what was asked, written down, makes the same module again; what cannot be written or read is refused with its place."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import logging
import re
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import graphreg
from graphreg import GraphRegError, NoMatchError, Penalty, RegularizerError, pipeline, schedules
from graphreg.recipes import files
from graphreg.recipes.lines import line_of
from graphreg.recipes.recipe import _CHECKS, _OF_THE_CALL, Recipe, recipe_dict
from graphreg.runtime.build_record import Asked
from graphreg.session.strengths import OWN
from pages import DOCS, run_page

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))


EVERYTHING: dict[str, Any] = {
    "hidden_dropout": 0.25,
    "noise": {"0": 0.1, "1": 0.0},
    "hidden_l1": 0.1,
    "weight_l2": {"weight": 1e-3, "pattern": ["0.*", "!0.bias"], "reduction": "sum", "name": "decay"},
    "own_dropout": {"2": 0.3},
    "rng": 7,
}


def result(module: nn.Module) -> list[Tensor]:
    """The output, the penalties and the gradients of a call in train mode."""
    module.train()
    output, penalties = module(X)
    total = output.square().sum() + sum(penalties.values())
    return [output, *penalties.values(), *torch.autograd.grad(total, list(module.parameters()), allow_unused=True, materialize_grads=True)]


def test_a_recipe_makes_the_same_module() -> None:
    model = net()
    module = graphreg.regularize(model, **EVERYTHING)
    graphreg.set_strength(module, "hidden_l1", 0.3)
    data = graphreg.recipe(module)
    assert data["strengths"] == {"hidden_l1": 0.3}
    again = graphreg.regularize(model, recipe=json.loads(json.dumps(data)))
    assert graphreg.recipe(again) == data
    assert graphreg.strengths(again) == graphreg.strengths(module)
    for ours, theirs in zip(result(again), result(module), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("suffix", ["json", "toml", "yaml", "yml"])
def test_files(suffix: str, tmp_path: Path) -> None:
    module = graphreg.regularize(net(), **EVERYTHING, penalties="attach", scale=2)
    path = tmp_path / f"recipe.{suffix}"
    graphreg.save_recipe(module, path)
    assert graphreg.load_recipe(path) == graphreg.recipe(module)
    again = graphreg.regularize(net(), recipe=path)
    assert graphreg.recipe(again) == graphreg.recipe(module)
    assert str(again.code) == str(module.code)
    assert graphreg.recipe(graphreg.regularize(net(), recipe=str(path))) == graphreg.recipe(module)


def test_the_text_of_a_file(tmp_path: Path) -> None:
    module = graphreg.regularize(
        net(), weight_l2={"weight": 1e-3, "reduction": "sum"}, dropout={'"]\n': 0.0, "1": 0.1}, rng=3, missing="ignore"
    )
    graphreg.save_recipe(module, tmp_path / "r.toml")
    assert (tmp_path / "r.toml").read_text() == (
        'recipe = 1\nrng = 3\nmissing = "ignore"\npenalties = "return"\n\n'
        '[[regularizers]]\nkey = "dropout"\npattern = "\\"]\\n"\nweight = 0.0\nname = "dropout"\nshare_axes = []\n\n'
        '[[regularizers]]\nkey = "dropout"\npattern = "1"\nweight = 0.1\nname = "dropout"\nshare_axes = []\n\n'
        '[[regularizers]]\nkey = "weight_l2"\npattern = "*"\nweight = 0.001\nname = "weight_l2"\nclean = false\nreduction = "sum"\n'
    )


# every regularizer and every option

CLASSES = sorted(
    {kind for kind in graphreg.registered().values() if kind.__module__.startswith("graphreg.passes")}, key=lambda kind: kind.__name__
)
PATTERNS = st.sampled_from(["*", "layer1.*", "**@relu#hidden", r"block\@1", ("a.*", "!a.b"), "'\"\t\\\\é😀"])
OPTIONS: dict[str, st.SearchStrategy[Any]] = {
    "name": st.none() | st.sampled_from(["mine", "other_1"]), "expect": st.none() | st.integers(0, 9), "clean": st.booleans(),
    "rng": st.none() | st.integers(-(2**70), 2**70), "reduction": st.sampled_from(["mean", "sum"]), "axis": st.none() | st.integers(0, 3),
    "share_axes": st.sampled_from([(), "time", ("batch", 2), 1]), "time_axis": st.integers(0, 2), "lengths": st.none() | st.just("lengths"),
    "wrt": st.sampled_from(["*", "a", ("a", "b")]), "estimator": st.sampled_from(["projection", "exact"]), "n": st.integers(1, 5),
    "always": st.booleans(), "norm": st.sampled_from(["squared", "l1"]), "block_size": st.sampled_from([3, 5, 7]),
}  # fmt: skip
NUMBERS = st.floats(1e-9, 0.99, allow_nan=False)
EVERY = st.integers(1, 9)
RAMPS = st.builds(graphreg.schedules.linear, NUMBERS, NUMBERS, st.integers(1, 10**9), every=EVERY)
SCHEDULES = RAMPS | st.builds(graphreg.schedules.cosine, NUMBERS, NUMBERS, st.integers(1, 9)) | st.builds(
    lambda values, first, every: graphreg.schedules.piecewise({**values, 0: first}, every=every),
    st.dictionaries(st.integers(1, 10**9), NUMBERS, max_size=3), NUMBERS, EVERY,
)  # fmt: skip
DEPTHS = st.builds(graphreg.by_depth, NUMBERS, NUMBERS | RAMPS)


@st.composite
def regularizers(draw: st.DrawFn, kind: type[graphreg.Regularizer]) -> graphreg.Regularizer:
    """An instance with options of every kind; an option that is not allowed there keeps its default."""
    made = None
    options: dict[str, Any] = {"pattern": draw(PATTERNS), "weight": draw(NUMBERS | DEPTHS | SCHEDULES)}
    for each in dataclasses.fields(kind):
        if each.name not in options:
            options[each.name] = draw(OPTIONS.get(each.name, NUMBERS))
        try:
            made = kind(**options)
        except RegularizerError:
            if made is not None:
                options.pop(each.name, None)
    assume(made is not None)
    assert made is not None
    return made


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
@settings(max_examples=4)
@given(data=st.data())
def test_every_regularizer(kind: type[graphreg.Regularizer], data: st.DataObject) -> None:
    made = data.draw(regularizers(kind))
    front_end, missing, penalties = (
        st.sampled_from([None, "export"]),
        st.sampled_from(["error", "warn"]),
        st.sampled_from(["return", "attach"]),
    )
    seeds = {"": data.draw(st.integers(-(2**70), 2**70))} | ({"a": made.rng} if getattr(made, "rng", None) is not None else {})
    choices = st.sampled_from(["seeded", "off"]) | NUMBERS | SCHEDULES
    native = st.one_of(st.just("keep"), choices, st.dictionaries(PATTERNS, choices, min_size=1))
    asked = Asked({"a": made}, seeds, *(data.draw(each) for each in (front_end, missing, native, penalties)))
    strength = data.draw(st.just(1.5) | SCHEDULES)
    sites = data.draw(st.dictionaries(st.sampled_from(["x", "layer1.0.relu"]), st.just(0.5) | SCHEDULES, max_size=2))
    stored = recipe_dict(asked, {"a": {OWN: strength, **sites}})
    for text, parsed in [
        (json.dumps(stored), json.loads), (files.toml_text(stored), tomllib.loads),
        (yaml.safe_dump(stored, sort_keys=False), yaml.safe_load),
    ]:  # fmt: skip
        read = parsed(text)
        assert read == stored
        recipe = Recipe.of(files.RecipeFile(read))
        assert recipe.regularizers == [made]
        assert recipe.options["rng"] == seeds[""]
        assert recipe.options["penalties"] == asked.penalties
        assert recipe.options.get("own_dropout", "keep") == asked.own_dropout
        assert recipe.strengths == {"a": {"**": strength, **sites} if sites else strength}


def test_every_option_of_a_built_in_is_tried() -> None:
    names = {each.name for kind in CLASSES for each in dataclasses.fields(kind)} - {"pattern", "weight"}
    assert set(OPTIONS) <= names


# in place, backend, plan, as keywords


def test_in_place() -> None:
    model = graphreg.regularize_(net(), **EVERYTHING, penalties="return", eval_penalties=True)
    graphreg.set_strength(model, "decay", 0.5)
    data = graphreg.recipe(model)
    assert data["eval_penalties"] is True
    again = graphreg.regularize_(net(), recipe=data)
    assert graphreg.recipe(again) == data
    for ours, theirs in zip(result(again), result(model), strict=True):
        assert torch.equal(ours, theirs)
    with pytest.raises(RegularizerError, match=r"^the recipe, at eval_penalties: only graphreg\.regularize_ has this option"):
        graphreg.regularize(net(), recipe=data)
    attached = graphreg.recipe(graphreg.regularize_(net(), hidden_dropout=0.5))
    assert attached["penalties"] == "attach"


def test_a_backend() -> None:
    options = {**EVERYTHING, "own_dropout": "seeded"}
    made = graphreg.backend(**options, inner="eager")
    graphreg.set_strength(made, "hidden_l1", 0.3)
    data = graphreg.recipe(made)
    again = graphreg.backend(recipe=data, inner="eager")
    assert graphreg.recipe(again) == data
    outputs = []
    for backend in (made, again):
        compiled = torch.compile(net(), backend=backend)
        outputs.append(compiled(X))
    assert torch.equal(*outputs)
    assert graphreg.recipe(torch.compile(net(), backend=again)) == data


def test_a_plan() -> None:
    traced = graphreg.trace(net())
    given = {name: value for name, value in EVERYTHING.items() if name not in ("rng", "own_dropout")}
    plan = graphreg.plan(traced, graphreg.from_kwargs(traced, **given), own_dropout={"2": 0.3})
    data = graphreg.recipe(plan)
    assert "rng" not in data
    assert "penalties" not in data
    assert str(graphreg.plan(traced, recipe=data)) == str(plan)
    more = graphreg.plan(traced, graphreg.build("hidden_l2", weight=0.5), recipe=data)
    assert list(more.regularizers) == [*plan.regularizers, "hidden_l2"]
    graphreg.rewrite(traced, more, 0)


def test_keywords_in_a_recipe() -> None:
    """A recipe written by hand may use the keywords of ``regularize``."""
    data = {"hidden_dropout": 0.25, "weight_l2": {"weight": 1e-3, "pattern": "0.*"}, "rng": 7, "strengths": {"weight_l2": 0.5}}
    module = graphreg.regularize(net(), recipe=data)
    assert graphreg.strengths(module) == {"hidden_dropout": 0.25, "weight_l2": 0.5}


def test_what_the_call_says_comes_first() -> None:
    module = graphreg.regularize(net(), hidden_dropout=0.25, noise={"0": 0.1, "3": 0.2}, hidden_l1=0.1, rng=7, missing="warn")
    graphreg.set_strength(module, "noise_1", 0.3)
    data = graphreg.recipe(module)
    other = graphreg.regularize(net(), recipe=data, noise={"0": 0.5}, hidden_l1=0, rng=8, own_dropout="off")
    assert graphreg.strengths(other) == {"hidden_dropout": 0.25, "noise": 0.5}
    written = graphreg.recipe(other)
    assert (written["rng"], written["own_dropout"], written["missing"]) == (8, "off", "warn")


@pytest.mark.parametrize("by_hand", [False, True])
def test_a_dict_of_keywords_is_keywords(by_hand: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """``regularizers={...}`` replaces the recipe's regularizers as the same keywords do, and nothing is stacked on them."""
    logged: list[str] = []
    monkeypatch.setattr(logging.getLogger("graphreg"), "warning", lambda text, *args: logged.append(text % args))
    data: dict[str, Any] = {"hidden_dropout": 0.2, "weight_l2": 0.1}
    data = data if by_hand else graphreg.recipe(graphreg.regularize(net(), rng=1, **data))
    for keywords, strengths in (
        ({"hidden_dropout": 0.1}, {"weight_l2": 0.1, "hidden_dropout": 0.1}),
        ({"hidden_dropout": None}, {"weight_l2": 0.1}),
        ({"Weight_L2": 0.3}, {"hidden_dropout": 0.2, "weight_l2": 0.3}),
        ({"hidden_l1": 0.3}, {"hidden_dropout": 0.2, "weight_l2": 0.1, "hidden_l1": 0.3}),
    ):
        every: Any = [graphreg.regularize(net(), recipe=data, regularizers=keywords), graphreg.backend(recipe=data, regularizers=keywords)]
        every.append(graphreg.regularize_(net(), recipe=data, regularizers=keywords))
        assert [graphreg.strengths(module) for module in every] == 3 * [strengths]
        assert not [line for line in logged if "given twice" in line]
    both = graphreg.regularize(net(), recipe=data, regularizers={"hidden_dropout": 0.1}, hidden_dropout=0.3)
    assert graphreg.strengths(both) == {"weight_l2": 0.1, "hidden_dropout": 0.1}
    assert len([line for line in logged if "hidden_dropout is given twice" in line]) == 1
    added = graphreg.regularize(net(), recipe=data, regularizers=[graphreg.passes.WeightL2("*", 0.5)])
    assert graphreg.strengths(added) == {"hidden_dropout": 0.2, "weight_l2": 0.1, "weight_l2_1": 0.5}


def test_generators_and_drawn_seeds_are_written_as_numbers() -> None:
    torch.manual_seed(3)
    splice = graphreg.build("dropout", weight=0.5, pattern="1", rng=torch.Generator().manual_seed(5))
    module = graphreg.regularize(net(), splice, hidden_noise=0.1, own_dropout="off")
    data = graphreg.recipe(module)
    assert type(data["rng"]) is type(data["regularizers"][0]["rng"]) is int
    again = graphreg.regularize(net(), recipe=data)
    for ours, theirs in zip(result(again), result(module), strict=True):
        assert torch.equal(ours, theirs)
    assert "rng" not in graphreg.recipe(graphreg.regularize(net(), weight_l2=0.1))  # without noise there is no seed


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.l = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.l(x).relu()


class Named(nn.Module):
    """Its block has a name with a special character."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.add_module("a@1", inner)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.get_submodule("a@1")(x)
        return y * 2


def test_blocks() -> None:
    model = nn.Sequential(Block(), Block(), Block(), nn.Linear(4, 3))
    module = graphreg.regularize(model, hidden_dropout=0.5, rng=0, blocks="[012]")
    data = json.loads(json.dumps(graphreg.recipe(module)))
    assert data["blocks"] == ["0", "1", "2"]
    again = graphreg.regularize(model, recipe=data)
    assert graphreg.recipe(again) == data
    assert torch.equal(again(X).output, module(X).output)
    assert str(graphreg.plan(graphreg.trace(model), recipe=data)) == str(
        graphreg.plan(graphreg.trace(model), graphreg.from_kwargs(model, hidden_dropout=0.5), blocks="[012]")
    )
    traced = graphreg.trace(Named(nn.Sequential(Block(), nn.ReLU())))
    data = graphreg.recipe(graphreg.plan(traced, graphreg.build("hidden_l2", weight=1.0, pattern="**@relu"), blocks=r"a\@1"))
    assert data["blocks"] == [r"a\@1"]
    assert graphreg.plan(traced, recipe=data).blocks == ("a@1",)
    with pytest.raises(RegularizerError, match=r"^the recipe, at blocks: graphreg\.backend has no such option: Dynamo calls no modules"):
        graphreg.backend(recipe={"blocks": "0"})
    with pytest.raises(RegularizerError, match=r"^the recipe, at blocks: blocks=3 is not allowed; give a selector as text, or a list"):
        graphreg.regularize(model, recipe={"blocks": 3})
    with pytest.raises(RegularizerError, match=r"^drop_connect replaces 3\.weight where '3' reads it, and '3' is a block itself"):
        graphreg.regularize(model, drop_connect=0.5, blocks="3")


def test_strengths_by_depth_and_by_site() -> None:
    model = nn.Sequential(Block(), Block(), Block(), nn.Linear(4, 3))
    module = graphreg.regularize(model, drop_path=graphreg.by_depth(0, 0.5), weight_l2=0.1, hidden_l1=0.2, rng=0)
    data = graphreg.recipe(module)
    assert data["regularizers"][0]["weight"] == {"by_depth": [0.0, 0.5]}
    assert "strengths" not in data
    graphreg.set_strength(module, "weight_l2", 0.3)
    graphreg.set_strength(module, "weight_l2", {"1.*": 0.7})
    graphreg.set_strength(module, "drop_path", {"0.relu": 0.25})
    graphreg.set_strength(module, "hidden_l1", 0.2)  # as it was made with
    data = json.loads(json.dumps(graphreg.recipe(module)))
    assert data["strengths"] == {"weight_l2": {"**": 0.3, "1.l.weight": 0.7}, "drop_path": {"0.relu": 0.25}}
    again = graphreg.regularize(model, recipe=data)
    assert graphreg.site_strengths(again) == graphreg.site_strengths(module)
    assert graphreg.recipe(again) == data
    for ours, theirs in zip(result(again), result(module), strict=True):
        assert torch.equal(ours, theirs)
    keyword = graphreg.regularize(model, recipe={"drop_path": {"by_depth": [0, 0.5]}})
    assert graphreg.site_strengths(keyword)["drop_path"] == {"0.relu": 0.0, "1.relu": 0.25, "2.relu": 0.5}
    with pytest.raises(RegularizerError, match=r"^the recipe, at strengths\.drop_path\.0\.relu: 'x' is not a finite number"):
        graphreg.regularize(model, recipe={"drop_path": 0.5, "strengths": {"drop_path": {"0.relu": "x"}}})


def test_schedules() -> None:
    model, rising = net(), graphreg.schedules.linear(0.1, 0.5, 9)
    module = graphreg.regularize(model, hidden_dropout=rising, hidden_l1=rising, weight_l2=rising, own_dropout={"2": rising}, rng=0)
    plain = {"linear": [0.1, 0.5, 9]}
    data = graphreg.recipe(module)
    assert data["own_dropout"] == {"2": plain} and [each["weight"] for each in data["regularizers"]] == [plain] * 3
    assert "strengths" not in data
    graphreg.set_strength(module, "hidden_l1", graphreg.schedules.cosine(1, 0, 3, every=2))
    graphreg.set_strength(module, "weight_l2", {"0.*": 0.7})
    graphreg.set_strength(module, "own_dropout", 0.3)
    data = json.loads(json.dumps(graphreg.recipe(module)))
    assert data["strengths"] == {"hidden_l1": {"cosine": [1.0, 0.0, 3], "every": 2}, "weight_l2": {"0.weight": 0.7}, "own_dropout": 0.3}
    again = graphreg.regularize(model, recipe=data)
    assert graphreg.recipe(again) == data
    for _ in range(2):
        for ours, theirs in zip(result(again), result(module), strict=True):
            assert torch.equal(ours, theirs)
        assert graphreg.site_strengths(again) == graphreg.site_strengths(module)
    by_hand = {"hidden_dropout": plain, "dropout": {"linear": 0.1}, "own_dropout": plain, "missing": "ignore"}
    keyword = graphreg.regularize(model, recipe=by_hand)
    assert graphreg.strengths(keyword)["hidden_dropout"] == 0.1 and graphreg.recipe(keyword)["own_dropout"] == plain
    placed = graphreg.regularize_(net(), recipe=data, example_inputs=X)
    assert graphreg.recipe(placed)["strengths"] == {**data["strengths"]}
    for wrong, says in (
        ({"hidden_dropout": {"linear": [0, 1]}}, r"^the recipe, at hidden_dropout: linear=\[0, 1\] is not allowed; give a list"),
        ({"own_dropout": {"2": {"linear": [0, 1, 5]}}}, r"^the recipe, at own_dropout: own_dropout=linear\(0, 1, 5\) \(for '2'\) is not"),
        ({"hidden_l1": 1, "strengths": {"hidden_l1": plain}}, r"^the recipe, at strengths\.hidden_l1: hidden_l1: linear.* has no clock"),
        ({"hidden_l1": 1, "strengths": {"hidden_l1": {"cosine": [1]}}}, r"^the recipe, at strengths\.hidden_l1: cosine=\[1\] is not"),
    ):
        with pytest.raises(RegularizerError, match=says):
            graphreg.regularize(model, recipe=wrong)


def test_schedules_are_written_in_one_way() -> None:
    """Keywords, ``regularizers=``, instances, ``own_dropout=`` and ``set_strength`` take the plain data that a recipe has."""
    model = nn.Sequential(Block(), Block(), nn.Dropout(0.5), nn.Linear(4, 3))
    rising, depth = {"linear": [0.1, 0.5, 9], "every": 2}, {"by_depth": [0, {"cosine": [0.1, 0.5, 9]}]}
    asked: dict[str, Any] = {
        "drop_path": {"weight": depth}, "dropout": {"0.relu": rising, "1.relu": 0.2}, "hidden_l1": rising,
        "weight_l2": {"weight": depth, "reduction": "sum"}, "noise": {"3": {"weight": rising, "share_axes": [0]}},
    }  # fmt: skip
    data = graphreg.recipe(graphreg.regularize(model, recipe={**asked, "own_dropout": {"2": rising}}, rng=0))
    made: list[Any] = [
        graphreg.regularize(model, **asked, own_dropout={"2": rising}, rng=0),
        graphreg.regularize(model, regularizers=asked, own_dropout={"2": rising}, rng=0),
        graphreg.regularize_(copy.deepcopy(model), regularizers=asked, own_dropout={"2": rising}, rng=0, penalties="return"),
    ]
    assert [graphreg.recipe(each) for each in made] == 3 * [data]
    weights = [(entry["name"], entry["weight"]) for entry in data["regularizers"]]
    assert weights[:2] == [("dropout", rising), ("dropout", 0.2)] and ("hidden_l1", rising) in weights and ("weight_l2", depth) in weights
    backend = graphreg.backend(regularizers={"hidden_l1": rising})
    assert graphreg.recipe(backend)["regularizers"][0]["weight"] == rising
    assert graphreg.build("dropout", weight=depth) == graphreg.build("dropout", weight=graphreg.by_depth(0, schedules.cosine(0.1, 0.5, 9)))
    falling: Any = {"cosine": [0.5, 0, 4]}
    for each in (*made[:2], backend):
        graphreg.set_strength(each, "hidden_l1", falling)
        assert graphreg.strengths(each)["hidden_l1"] == 0.5
        assert graphreg.recipe(each)["strengths"] == {"hidden_l1": falling}
    graphreg.set_strength(made[0], "own_dropout", {"2": falling})
    assert graphreg.recipe(made[0])["strengths"]["own_dropout"] == {"2": falling}


def test_a_plan_keeps_the_seed_of_a_splice() -> None:
    traced = graphreg.trace(net())
    data = graphreg.recipe(graphreg.plan(traced, graphreg.build("dropout", weight=0.5, pattern="1", rng=5)))
    assert data["regularizers"][0]["rng"] == 5
    unseeded = graphreg.plan(traced, graphreg.build("dropout", weight=0.5, pattern="1", rng=torch.Generator()))
    with pytest.raises(RegularizerError, match=r"^dropout: rng is .*Generator.*, which a recipe cannot hold"):
        graphreg.recipe(unseeded)


def test_a_scale_that_is_no_number() -> None:
    module = graphreg.regularize(net(), hidden_l1=0.1, penalties="attach", scale=lambda: 2.0)
    data = graphreg.recipe(module)
    assert data["scale"] == "given in the call"
    with pytest.raises(
        RegularizerError, match=r"^the recipe, at scale: the recipe was made with a scale that cannot .* Give scale= in the call"
    ):
        graphreg.regularize(net(), recipe=data)
    assert graphreg.recipe(graphreg.regularize(net(), recipe=data, scale=4.0))["scale"] == 4.0


@pytest.mark.parametrize("front_end", ["auto", "symbolic", "export"])
def test_the_front_end_is_the_one_that_was_asked_for(front_end: Any) -> None:
    model = net()
    module = graphreg.regularize(model, weight_l2=0.1, example_inputs=X, front_end=front_end)
    data = graphreg.recipe(module)
    assert data.get("front_end", "auto") == front_end
    again = graphreg.regularize(model, recipe=data, example_inputs=X)
    assert str(graphreg.report(again)) == str(graphreg.report(module))


def test_pickles_and_copies_keep_it(tmp_path: Path) -> None:
    module = graphreg.regularize(net(), **EVERYTHING)
    torch.save(module, tmp_path / "module.pt")
    assert graphreg.recipe(torch.load(tmp_path / "module.pt", weights_only=False)) == graphreg.recipe(module)


# what cannot be written


class Third(Penalty, keys=("third",)):
    factor: Any = 2.0

    def __call__(self, z: Tensor) -> Tensor:
        return z.square().mean() * float(self.factor)


class Keyless(Penalty):
    def __call__(self, z: Tensor) -> Tensor:
        return z.square().mean()


def test_a_third_partys_regularizer_goes_by_its_key() -> None:
    module = graphreg.regularize(net(), Third("1", 0.1, factor=3))
    assert graphreg.recipe(module)["regularizers"] == [{"key": "third", "pattern": "1", "weight": 0.1, "clean": False, "factor": 3}]
    assert graphreg.recipe(graphreg.regularize(net(), recipe=graphreg.recipe(module))) == graphreg.recipe(module)


@pytest.mark.parametrize(
    ("regularizer", "says"),
    [
        (
            Third(lambda site: site.name == "1", 0.1),
            r"third: pattern is <function .*>, which a recipe cannot hold\. Write the selector as text",
        ),
        (
            Keyless("1", 0.1),
            r"keyless: the class Keyless has no key of its own, by which a recipe could name it\. Give the class a key: class Keyless",
        ),
        (
            Third("1", 0.1, factor=torch.ones(2)),
            r"third: factor is Tensor of shape \(2,\), which a recipe cannot hold\. Give text, a number",
        ),
    ],
)
def test_what_cannot_be_written_is_refused(regularizer: graphreg.Regularizer, says: str) -> None:
    plan = graphreg.plan(graphreg.trace(net()), regularizer)
    with pytest.raises(RegularizerError, match=f"^{says}"):
        graphreg.recipe(plan)


# what cannot be read

TOML = 'rng = 3\n# weight = 1\n\n[[regularizers]]\nkey = "dropout"\nweight = 0.1\n\n[[regularizers]]\nkey = "weight_l2"\n'
WRONG: list[tuple[str, str, str]] = [
    (".toml", TOML + "wieght = 0.1\n", r", line 10, at regularizers\[1\]\.wieght: WeightL2 has no option 'wieght'\. Near options: weight"),
    (".toml", TOML + 'weight = "1e-4"\n', r", line 10, at regularizers\[1\]\.weight: WeightL2: weight is '1e-4'.*YAML reads 1e-4"),
    (".toml", TOML + "weight = 1\nexpect = -1\n", r", line 11, at regularizers\[1\]\.expect: WeightL2: expect=-1 is no count of sites"),
    (".toml", TOML.replace("weight_l2", "wieght_l2"), r", line 9, at regularizers\[1\]\.key: no .* called 'wieght_l2'\. Near keys"),
    (".toml", "[[regularizers]]\nweight = 1\n", r", line 2, at regularizers\[0\]: \{'weight': 1\} is not a dict with a 'key'"),
    (".toml", "[regularizers]\nweight = 1\n", r", line 1, at regularizers: this must be a list of dicts, each with a 'key', not \{"),
    (".toml", "rng =\n", r": this is not TOML \(Invalid value \(at line 1, column 6\)\)\."),
    (".json", '{"a":\n}', r", line 2: this is not JSON \(Expecting value\)\."),
    (".json", '{"rng": 1, "rng": 2}', r": the key 'rng' is given twice in one object\."),
    (".json", '{"hidden_dropout": NaN}', r": NaN is no number that a recipe can have\."),
    (".json", "[1]", r": a recipe is a dict, not \[1\]\."),
    (".json", '{\n"recipe": 2}', r", line 2, at recipe: the version is 2; this graphreg reads version 1\."),
    (".json", '{"hidden_dropout": 0.1,\n "rng": "7"}', r", line 2, at rng: rng='7' is not allowed; give an int"),
    (".json", '{"verify": true}', r", line 1, at verify: verify= is given in the call, and is no part of a recipe\."),
    (".json", '{"penalties": "add"}', r", line 1, at penalties: penalties='add'"),
    (".json", '{"front_end": "fx"}', r", line 1, at front_end: front_end='fx' is unknown; it is 'auto', 'symbolic' or 'export'\."),
    (".json", '{"missing": "no"}', r", line 1, at missing: missing='no' is unknown"),
    (".json", '{"scale": "big"}', r", line 1, at scale: "),
    (".json", '{"eval_penalties": 1}', r", line 1, at eval_penalties: eval_penalties=1 is not allowed; give True or False\."),
    (".json", '{"own_dropout": {"a": 2}}', r", line 1, at own_dropout: "),
    (".json", '{"own_dropout": [1]}', r", line 1, at own_dropout: own_dropout is a choice, a rate, a dict of selectors"),
    (".json", '{"drop_path": {"by_depth": [1, 2, 3]}}', r", line 1, at drop_path: by_depth=\[1, 2, 3\] is not allowed; give a list of two"),
    (".json", '{"drop_path": {"by_depth": ["a", 1]}}', r", line 1, at drop_path: by_depth: first='a' is not allowed; give two numbers"),
    (
        ".json", '{"regularizers": [{"key": "drop_path", "weight": {"by_depth": [1]}}]}',
        r", line 1, at regularizers\[0\]\.weight: by_depth=\[1\] is not allowed; give a list of two numbers",
    ),
    (".json", '{"strengths": [1]}', r", line 1, at strengths: this must be a dict of names of regularizers to numbers, not \[1\]\."),
    (".yaml", "rng: 1\nhidden_dropout: 1e-4\n", r", line 2, at hidden_dropout: .*write it with a dot, 1\.0e-4"),
    (".yaml", "strengths:\n  a: 1e-4\n", r", line 2, at strengths\.a: '1e-4' is not a finite number\. A number in quotes is a string"),
    (".yaml", "hiden_dropout: 0.1\n", r", line 1, at hiden_dropout: 'hiden_dropout' is no option of a recipe.* Near keys"),
    (".yaml", "rng: 1\na: [\n", r", line 3: this is not YAML \("),
    (".yaml", "rng: 1\nhidden_l1: 0.1\nrng: 2\n", r", line 3: the key 'rng' is given twice in one mapping\."),
    (".yaml", "regularizers:\n- {key: weight_l2, weight: 1, weight: 2}\n", r", line 2: the key 'weight' is given twice in one mapping\."),
    (".yaml", "3: 1\n", r", at \[3\]: 3 is no option of a recipe and no key of a regularizer\."),
]  # fmt: skip


@pytest.mark.parametrize(("suffix", "text", "says"), WRONG)
def test_wrong_files(suffix: str, text: str, says: str, tmp_path: Path) -> None:
    path, model = tmp_path / f"recipe{suffix}", net()
    path.write_text(text)
    for call in (graphreg.load_recipe, lambda file: graphreg.regularize(model, recipe=file), lambda file: graphreg.backend(recipe=file)):
        with pytest.raises(GraphRegError, match=f"^{re.escape(str(path))}{says}") as raised:
            call(path)
        assert isinstance(raised.value, NoMatchError if "Near keys" in says or "3 is no option" in says else RegularizerError)
    assert type(model[0]) is nn.Linear
    assert vars(model).keys() == vars(net()).keys()


def test_a_strength_of_nothing() -> None:
    with pytest.raises(NoMatchError, match=r"^the recipe, at strengths\.decay: no regularizer is named 'decay'\. Names: hidden_l1\."):
        graphreg.regularize(net(), recipe={"hidden_l1": 0.1, "strengths": {"decay": 0.1}})
    with pytest.raises(RegularizerError, match=r"^the recipe, at strengths\.hidden_l1: HiddenL1 hidden_l1: weight=-1\.0 is not allowed"):
        graphreg.regularize(net(), recipe={"hidden_l1": 0.1, "strengths": {"hidden_l1": -1}})


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (3, r"recipe=3 is not allowed; give what graphreg\.recipe returned, or the path of a recipe's file"),
        ("recipe.ini", r"the recipe recipe\.ini has the suffix '\.ini'; a recipe's file has \.json, \.toml, \.yaml or \.yml"),
        ("missing.json", r"the recipe missing\.json cannot be read: "),
    ],
)
def test_what_is_no_recipe(given: Any, says: str) -> None:
    with pytest.raises(RegularizerError, match=f"^{says}"):
        graphreg.regularize(net(), recipe=given)


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    module = graphreg.regularize(net(), hidden_l1=0.1)
    with pytest.raises(RegularizerError, match=r"cannot be written: "):
        graphreg.save_recipe(module, tmp_path / "none" / "r.json")
    with pytest.raises(RegularizerError, match=r"^None is no path of a recipe; give a file with the suffix"):
        graphreg.save_recipe(module, None)  # type: ignore[arg-type]


def test_off_is_a_word_in_yaml(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("own_dropout: {'1': off}\n")
    (tmp_path / "on.yaml").write_text("own_dropout: {'1': true}\n")
    net = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
    assert graphreg.load_recipe(tmp_path / "r.yaml")["own_dropout"] == {"1": "off"}
    assert "own_dropout at 1: off" in str(graphreg.diff(graphreg.regularize(net, recipe=tmp_path / "r.yaml")))
    with pytest.raises(RegularizerError, match="own_dropout=True"):
        graphreg.regularize(net, recipe=tmp_path / "on.yaml")


def test_without_pyyaml(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "yaml", None)
    (tmp_path / "r.yaml").write_text("rng: 1")
    with pytest.raises(GraphRegError, match=r"^recipes in YAML need PyYAML: pip install 'graphreg\[yaml\]'"):
        graphreg.load_recipe(tmp_path / "r.yaml")


def test_options_of_regularize_are_known_to_recipes() -> None:
    """A new option of ``regularize`` is an option of recipes, too, or of the call alone."""
    for function in (pipeline.regularize, graphreg.regularize_):
        names = {name for name, p in inspect.signature(function).parameters.items() if p.kind is p.KEYWORD_ONLY}
        assert names <= {*_CHECKS, *_OF_THE_CALL}


# the lines of files

KEYS = st.sampled_from(["a", "key", "weight", "with space", "a.b", "é"])
VALUES = st.recursive(
    st.integers() | st.booleans() | st.sampled_from(["", "key", "a: b", "x = 1"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=8,
)


def places(data: Any, at: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    items = data.items() if isinstance(data, Mapping) else enumerate(data) if isinstance(data, list) else ()
    return [place for key, value in items for place in [(*at, key), *places(value, (*at, key))]]


@given(st.dictionaries(KEYS, VALUES, min_size=1, max_size=4))
def test_a_line_is_that_of_the_key_or_unknown(data: dict[str, Any]) -> None:
    for text in (json.dumps(data, indent=1, ensure_ascii=False), yaml.safe_dump(data, sort_keys=False, allow_unicode=True)):
        for place in places(data):
            line = line_of(text, data, place)
            key = next(step for step in reversed(place) if isinstance(step, str))
            assert line is None or isinstance(place[-1], int) or key in text.splitlines()[line - 1]


def test_lines() -> None:
    data = {"a": {"key": 1}, "b": [{"key": 2}, {"other": 3, "key": 4}]}
    text = json.dumps(data, indent=1)
    found = {place: line_of(text, data, place) for place in places(data)}
    expected = {
        ("a",): 2,
        ("a", "key"): 3,
        ("b",): 5,
        ("b", 0): 7,
        ("b", 0, "key"): 7,
        ("b", 1): 10,
        ("b", 1, "other"): 10,
        ("b", 1, "key"): 11,
    }
    assert found == expected
    assert line_of('{"a": "\\"a\\": 1"}', {"a": '"a": 1'}, ("a",)) in (None, 1)
    assert line_of("", {}, ()) is None


def test_a_file_that_an_editor_began_with_a_byte_order_mark(tmp_path: Path) -> None:
    for name, text in {"r.toml": "weight_l2 = 0.1\n", "r.json": '{"weight_l2": 0.1}', "r.yaml": "weight_l2: 0.1\n"}.items():
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
        module = graphreg.regularize(nn.Linear(2, 2), recipe=tmp_path / name)
        assert list(module(torch.ones(1, 2)).penalties) == ["weight_l2"]


@pytest.mark.parametrize("section", ["", "In a file", "By hand"])
def test_the_page(section: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if section == "By hand":
        (tmp_path / "recipe.toml").write_text(re.findall(r"```toml\n(.*?)```", (DOCS / "recipes.md").read_text(), re.DOTALL)[-1])
    run_page("recipes.md", section)
