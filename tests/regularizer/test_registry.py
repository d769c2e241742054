"""The registry, the keyword grammar, and a user's own regularizers."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphreg
import graphreg.passes
from graphreg import NoMatchError, Penalty, Regularizer, RegularizerError, Splice, build, from_kwargs, registered, regularize
from graphreg.passes import BernoulliDropout, GaussianNoise, HiddenL1, WeightL1, WeightL2
from graphreg.regularizer import registry


def net() -> nn.Sequential:
    return nn.Sequential(OrderedDict(hid1=nn.Linear(4, 6), act1=nn.Tanh(), hid2=nn.Linear(6, 5), act2=nn.Tanh(), out=nn.Linear(5, 2)))


def summary(regularizers: list[Regularizer]) -> list[tuple[Any, ...]]:
    return [(r.name, type(r).__name__, r.pattern, r.weight) for r in regularizers]


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a test registers is forgotten after it."""
    registered()
    monkeypatch.setattr(registry, "_classes", dict(registry._classes))
    yield
    registry._discover.cache_clear()


# Keys

KEYS = {
    "dropout": BernoulliDropout,
    "noise": GaussianNoise,
    "weight_l1": WeightL1,
    "weight_sparsity": WeightL1,
    "weight_l2": WeightL2,
    "weight_decay": WeightL2,
    "hidden_l1": HiddenL1,
    "hidden_sparsity": HiddenL1,
}


@pytest.mark.parametrize("key", [*KEYS, *dict.fromkeys(cls.__name__ for cls in KEYS.values())])
def test_build(key: str) -> None:
    cls = KEYS.get(key) or getattr(graphreg.passes, key)
    assert registered()[key.lower()] is cls
    for spelling in (key, key.upper(), key.lower(), key.capitalize(), key.title()):
        assert build(spelling, weight=0.25) == cls("*", 0.25)
    assert build(key, pattern="hid*", weight=0.25, name="mine", expect=2) == cls("hid*", 0.25, name="mine", expect=2)


def test_registered_has_each_keyword_once() -> None:
    found = registered()
    built_in = {cls for cls in found.values() if cls.__module__.startswith("graphreg.passes.")}
    keywords = [keyword for keyword, cls in found.items() if cls in built_in]
    assert {getattr(graphreg.passes, name) for name in graphreg.passes.__all__} == built_in
    assert len(keywords) == len(set(keywords)) == len(built_in) + len(registry.PREFIXED)  # 43: one for each class, and those with a role
    assert all(found[keyword] is BernoulliDropout for keyword in ("dropout", "input_dropout", "hidden_dropout", "output_dropout"))
    assert found.aliases("weight_l2") == ("weight_decay", "weightl2")
    assert found.aliases("hidden_dropout") == found.aliases("zoneout") == () and "weight_decay" not in keywords
    with pytest.raises(KeyError):
        found["weight_l3"]


def test_each_spelling_is_a_keyword() -> None:
    """One source: what is registered is what ``from_kwargs`` and ``build`` take, and a recipe, too."""
    found = registered()
    for spelling in found.spellings:
        cls = found[spelling]
        if not cls.__module__.startswith("graphreg.passes."):  # of another test
            continue
        assert spelling in found and spelling.upper() in found
        limit = {field: 1.0 for field in ("limit",) if field in cls.__dataclass_fields__}
        pattern = {} if spelling in registry.PREFIXED else {"pattern": "hid1"}
        (made,) = from_kwargs(net(), **{spelling: {"strength": 0.1, **limit, **pattern}})
        assert type(made) is cls and made == build(spelling, strength=0.1, name=made.name, **limit, **pattern)


def test_build_with_a_role() -> None:
    assert build("Input_Dropout", strength=0.1) == BernoulliDropout("**#input", 0.1, name="input_dropout")
    with pytest.raises(RegularizerError, match=r"hidden_noise names its own sites; write build\('noise', pattern=\.\.\.\)"):
        build("hidden_noise", strength=0.1, pattern="hid1")
    recipe = {"regularizers": [{"key": "hidden_dropout", "strength": 0.1}]}
    assert graphreg.plan(graphreg.trace(net()), recipe=recipe).regularizers == {"hidden_dropout": build("hidden_dropout", strength=0.1)}


def test_registered_prints_as_a_table() -> None:
    lines = registered().text().splitlines()
    assert lines[0].split() == ["keyword", "also", "class"]
    rows = [line.split() for line in lines[1:]]
    assert ["weight_l2", "weight_decay", "WeightL2"] in rows and ["hidden_dropout", "BernoulliDropout"] in rows
    assert len(rows) == len(registered())


def test_registered_gives_a_copy() -> None:
    found = registered()
    found._classes.clear()
    assert build("dropout", weight=0.1) == BernoulliDropout("*", 0.1)
    assert all(key == key.lower() and issubclass(cls, Regularizer) for key, cls in registered().items())


# The keyword grammar


def test_order_is_dropout_noise_then_the_rest() -> None:
    found = from_kwargs(
        net(), weight_l2=0.1, output_noise=0.2, hidden_l1=0.3, hidden_dropout=0.4, input_noise=0.5, dropout={"hid1": 0.6},
        weight_l1=0.7, output_dropout=0.8, noise={"hid2": 0.9}, input_dropout=0.15, hidden_noise=0.25,
    )  # fmt: skip
    assert summary(found) == [
        ("input_dropout", "BernoulliDropout", "**#input", 0.15),
        ("hidden_dropout", "BernoulliDropout", "*", 0.4),
        ("output_dropout", "BernoulliDropout", "**#output", 0.8),
        ("dropout", "BernoulliDropout", "hid1", 0.6),
        ("input_noise", "GaussianNoise", "**#input", 0.5),
        ("hidden_noise", "GaussianNoise", "*", 0.25),
        ("output_noise", "GaussianNoise", "**#output", 0.2),
        ("noise", "GaussianNoise", "hid2", 0.9),
        ("weight_l2", "WeightL2", "*", 0.1),
        ("hidden_l1", "HiddenL1", "*", 0.3),
        ("weight_l1", "WeightL1", "*", 0.7),
    ]


def test_the_rest_is_in_keyword_order() -> None:
    one = from_kwargs(net(), weight_l1=0.1, hidden_l1=0.2, weight_l2=0.3)
    other = from_kwargs(net(), weight_l2=0.3, weight_l1=0.1, hidden_l1=0.2)
    assert [r.name for r in one] == ["weight_l1", "hidden_l1", "weight_l2"]
    assert [r.name for r in other] == ["weight_l2", "weight_l1", "hidden_l1"]


@pytest.mark.parametrize("keyword", ["hidden_dropout", "input_noise", "dropout", "weight_l2", "weight_decay", "hidden_l1"])
def test_keywords_know_no_case(keyword: str) -> None:
    expected = from_kwargs(net(), **{keyword: 0.1})
    assert len(expected) == 1 and expected[0].name == keyword
    for spelling in (keyword.upper(), keyword.title()):
        assert from_kwargs(net(), **{spelling: 0.1}) == expected


def test_sites_of_the_prefixed_keywords() -> None:
    traced = graphreg.trace(net())
    found = graphreg.plan(traced, from_kwargs(traced, input_dropout=0.1, hidden_dropout=0.2, output_noise=0.3, dropout=0.4))
    sites = {name: [edit.site.op for edit in found.of(name)] for name in found.regularizers}
    hidden = ["Tanh", "Tanh"]
    assert sites == {"input_dropout": ["input"], "hidden_dropout": hidden, "dropout": hidden, "output_noise": ["Linear"]}


@pytest.mark.parametrize("off", [0, 0.0, None, False])
def test_a_scalar_that_means_off(off: Any) -> None:
    keywords = ("hidden_dropout", "input_noise", "dropout", "noise", "weight_l2", "hidden_l1")
    for keyword in keywords:
        assert from_kwargs(net(), **{keyword: off}) == []
    module = regularize(net(), **dict.fromkeys(keywords, off))
    assert graphreg.strengths(module) == {}


@pytest.mark.parametrize(
    "options",
    [{"hidden_dropout": {"weight": 0}}, {"regularizers": BernoulliDropout("*", 0, name="hidden_dropout")}],
    ids=["dict", "instance"],
)
def test_a_weight_of_zero_can_be_raised_later(options: dict[str, Any]) -> None:
    model, x = net(), torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    module = regularize(model, rng=0, **options)
    assert graphreg.strengths(module) == {"hidden_dropout": 0.0}
    assert torch.equal(module(x).output, model(x))
    graphreg.set_strength(module, "hidden_dropout", 0.5)
    assert not torch.allclose(module(x).output, model(x))


def test_a_penalty_of_weight_zero_can_be_raised_later() -> None:
    module, x = regularize(net(), hidden_l1={"weight": 0}), torch.ones(1, 4)
    with torch.no_grad():
        assert module(x).penalties["hidden_l1"].item() == 0
        graphreg.set_strength(module, "hidden_l1", 0.5)
        assert module(x).penalties["hidden_l1"].item() > 0


def test_dict_of_selectors_to_rates() -> None:
    found = from_kwargs(net(), dropout={"hid1": 0.1, ("hid2", "act2"): 0.2, "act*": {"weight": 0.3, "expect": 2}}, noise={"hid*": 0.4})
    assert summary(found) == [
        ("dropout", "BernoulliDropout", "hid1", 0.1),
        ("dropout", "BernoulliDropout", ("hid2", "act2"), 0.2),
        ("dropout", "BernoulliDropout", "act*", 0.3),
        ("noise", "GaussianNoise", "hid*", 0.4),
    ]
    assert found[2].expect == 2


def test_dict_of_options() -> None:
    (found,) = from_kwargs(net(), weight_l2={"weight": 0.1, "pattern": "hid1.*", "reduction": "sum", "expect": 1})
    assert found == WeightL2("hid1.*", 0.1, reduction="sum", expect=1, name="weight_l2")
    (found,) = from_kwargs(net(), dropout={"weight": 0.1, "pattern": "hid1", "rng": 3})
    assert found == BernoulliDropout("hid1", 0.1, rng=3, name="dropout")
    (found,) = from_kwargs(net(), hidden_dropout={"weight": 0.1, "name": "mine"})
    assert found == BernoulliDropout("*", 0.1, name="mine")


def test_regularizers_take_one_several_or_keywords() -> None:
    one, other = BernoulliDropout("hid1", 0.1), WeightL2("*", 0.2)
    assert from_kwargs(net(), regularizers=one) == [one]
    assert from_kwargs(net(), regularizers=[one, other]) == [one, other]
    assert from_kwargs(net(), regularizers=(other, one)) == [other, one]
    assert from_kwargs(net(), regularizers=iter([one])) == [one]
    keywords = {"weight_l2": 0.2, "hidden_dropout": 0.1}
    assert from_kwargs(net(), regularizers=keywords) == from_kwargs(net(), **keywords) != []
    assert from_kwargs(net(), regularizers=None) == from_kwargs(net(), regularizers=[]) == from_kwargs(net(), regularizers={}) == []


def test_regularizers_are_combined_with_the_rest() -> None:
    names = {"hidden_noise", "weight_l2", "mine", "yours"}
    mine, yours = HiddenL1("hid1", 0.1, name="mine"), HiddenL1("hid2", 0.1, name="yours")
    for module in (
        regularize(net(), mine, regularizers=yours, hidden_noise=0.1, weight_l2=0.1),
        regularize(net(), mine, yours, regularizers={"hidden_noise": 0.1}, weight_l2=0.1),
        regularize(net(), [mine], [yours], hidden_noise=0.1, weight_l2=0.1),
        regularize(net(), [mine, [yours]], regularizers={"hidden_noise": 0.1, "weight_l2": 0.1}),
    ):
        assert set(graphreg.strengths(module)) == names


def test_names_on_repeats() -> None:
    several = [
        BernoulliDropout("hid1", 0.1), WeightL2("*", 0.2), BernoulliDropout("hid2", 0.3), BernoulliDropout("act1", 0.4),
        WeightL2("out.*", 0.5),
    ]  # fmt: skip
    assert graphreg.strengths(regularize(net(), several)) == {
        "dropout": 0.1, "weight_l2": 0.2, "dropout_1": 0.3, "dropout_2": 0.4, "weight_l2_1": 0.5,
    }  # fmt: skip
    assert graphreg.strengths(regularize(net(), dropout={"hid1": 0.1, "hid2": 0.2})) == {"dropout": 0.1, "dropout_1": 0.2}


def test_a_repeat_does_not_take_a_name_that_is_given() -> None:
    given = [WeightL2("*", 0.1), WeightL2("*", 0.2), WeightL2("*", 0.3, name="weight_l2_1")]
    assert graphreg.strengths(regularize(net(), given)) == {"weight_l2": 0.1, "weight_l2_2": 0.2, "weight_l2_1": 0.3}


def test_the_name_is_the_keyword_then_the_first_key() -> None:
    assert list(graphreg.strengths(regularize(net(), weight_decay=0.1))) == ["weight_decay"]
    assert list(graphreg.strengths(regularize(net(), WeightL2("*", 0.1)))) == ["weight_l2"]
    assert list(graphreg.strengths(regularize(net(), weightl2=0.1))) == ["weightl2"]
    assert list(regularize(net(), weight_decay=0.1)(torch.ones(1, 4)).penalties) == ["weight_decay"]


# A user's own


@pytest.mark.usefixtures("fresh")
def test_own_penalty() -> None:
    class RowNorm(Penalty, keys=("row_norm",), on="parameters"):
        def __call__(self, w: Tensor) -> Tensor:
            return w.flatten(1).norm(dim=1).mean()

    model = nn.Sequential(nn.Linear(2, 2))
    model[0].weight.data = torch.tensor([[3.0, 4.0], [0.0, 1.0]])  # row norms 5 and 1: mean 3
    assert build("Row_Norm", weight=1) == build("rownorm", weight=1) == RowNorm("*", 1)
    for module in (regularize(model, row_norm=0.5), regularize(model, RowNorm("*", 0.5))):
        penalties = module(torch.ones(1, 2)).penalties
        assert list(penalties) == ["row_norm"] and penalties["row_norm"].detach().item() == 1.5
    with pytest.raises(NoMatchError, match=r"'row_nrm' is no option.*Near keys: row_norm"):
        regularize(model, row_nrm=0.5)


@pytest.mark.usefixtures("fresh")
def test_own_penalty_with_options() -> None:
    class Power(Penalty, keys=("power",)):
        """mean |z|^exponent"""

        exponent: float = 2.0

        def check(self) -> None:
            super().check()
            self.require(self.exponent > 0, "exponent", "above 0")

        def __call__(self, z: Tensor) -> Tensor:
            return z.abs().pow(self.exponent).mean()

    model, x = nn.Sequential(OrderedDict(a=nn.Linear(2, 2), act=nn.ReLU(), b=nn.Linear(2, 1))), torch.tensor([[1.0, 2.0]])
    model.a.weight.data, model.a.bias.data = torch.eye(2), torch.zeros(2)
    assert regularize(model, power=0.5)(x).penalties["power"].detach().item() == 1.25  # (1 + 4) / 2 halved
    assert regularize(model, power={"weight": 0.5, "exponent": 3.0})(x).penalties["power"].detach().item() == 2.25  # (1 + 8) / 2 halved
    with pytest.raises(RegularizerError, match=r"Power power: exponent=-1\.0 is not allowed; exponent must be above 0"):
        regularize(model, power={"weight": 0.5, "exponent": -1.0})
    with pytest.raises(RegularizerError, match=r"Power has no option 'exponnt'.*Near options: exponent"):
        Power("*", 0.5, exponnt=1.0)


@pytest.mark.usefixtures("fresh")
def test_own_splice() -> None:
    class Shrink(Splice, keys=("shrink",)):
        def __call__(self, z: Tensor, weight: Tensor) -> Tensor:
            return z * weight.to(z.dtype)

    model, x = nn.Sequential(OrderedDict(a=nn.Linear(2, 2), act=nn.ReLU(), b=nn.Linear(2, 2))), torch.tensor([[1.0, 2.0]])
    for layer in (model.a, model.b):
        layer.weight.data, layer.bias.data = torch.eye(2), torch.zeros(2)
    for module in (regularize(model, shrink=0.5), regularize(model, Shrink("act", 0.5)), regularize(model, SHRINK=0.5)):
        assert module(x).output.tolist() == [[0.5, 1.0]]
        assert module.eval()(x).output.tolist() == [[1.0, 2.0]]
        module.train()


@pytest.mark.usefixtures("fresh")
def test_a_class_without_keys_is_not_registered() -> None:
    before = registered()

    class Quiet(Penalty):
        def __call__(self, z: Tensor) -> Tensor:
            return z.mean()

    assert registered() == before
    assert list(graphreg.strengths(regularize(net(), Quiet("*", 0.1), Quiet("hid1", 0.2)))) == ["quiet", "quiet_1"]


@pytest.mark.usefixtures("fresh")
def test_a_definition_may_be_run_again() -> None:
    """As a notebook's cell is."""

    def define(factor: float) -> type[Penalty]:
        class Cell(Penalty, keys=("cell_penalty",)):
            def __call__(self, z: Tensor) -> Tensor:
                return factor * z.abs().mean()

        return Cell

    first, second = define(1.0), define(2.0)
    assert first is not second
    assert registered()["cell_penalty"] is registered()["cell"] is second


# Third parties


def offer(monkeypatch: pytest.MonkeyPatch, *values: str) -> None:
    """Make it look as if packages with these entry points were installed, and nothing imported yet."""
    entries = [EntryPoint(value.partition(":")[2].lower(), value, "graphreg.passes") for value in values]

    def entry_points(*, group: str) -> list[EntryPoint]:
        return [entry for entry in entries if entry.group == group]

    monkeypatch.setattr(registry, "entry_points", entry_points)
    registry._discover.cache_clear()


def package(directory: Path, name: str, key: str) -> None:
    (directory / f"{name}.py").write_text(
        f"from graphreg import Penalty\n\nclass Theirs(Penalty, keys=({key!r},)):\n    def __call__(self, z):\n        return z.mean()\n"
    )


@pytest.mark.usefixtures("fresh")
def test_a_broken_entry_point_is_named_and_harmless(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "their_syntax.py").write_text("def broken(:\n")
    package(tmp_path, "their_clash", "dropout")
    package(tmp_path, "their_good", "theirs")
    monkeypatch.syspath_prepend(tmp_path)
    offer(monkeypatch, "their_nothing:Absent", "their_syntax:Broken", "their_clash:Theirs", "their_good:Missing", "their_good:Theirs")
    with pytest.warns(UserWarning) as caught:
        found = registered()
    said = [str(warning.message) for warning in caught]
    assert len(said) == 4
    for sentence, value, error in zip(
        said, ["their_nothing:Absent", "their_syntax:Broken", "their_clash:Theirs", "their_good:Missing"],
        ["ModuleNotFoundError", "SyntaxError", "the key 'dropout' of Theirs belongs to", "AttributeError"], strict=True,
    ):  # fmt: skip
        assert f"{value.partition(':')[2].lower()} = {value} was not loaded" in sentence and error in sentence
    assert found["dropout"] is BernoulliDropout and found["theirs"].__module__ == "their_good"
    assert found.spellings >= set(KEYS)
    assert list(graphreg.strengths(regularize(net(), theirs=0.1, hidden_dropout=0.2, rng=0))) == ["hidden_dropout", "theirs"]


@pytest.mark.usefixtures("fresh")
def test_a_good_entry_point_is_silent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package(tmp_path, "their_quiet", "quiet_theirs")
    monkeypatch.syspath_prepend(tmp_path)
    offer(monkeypatch, "their_quiet:Theirs")
    assert build("quiet_theirs", weight=0.1).weight == 0.1
    assert "quiet_theirs" in registered()
