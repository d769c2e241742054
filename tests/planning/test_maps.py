"""Keywords as they stand in notebooks and configuration files: maps of selectors, options, numbers of every kind, and what is none."""

from __future__ import annotations

import re
from collections import OrderedDict
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import graphreg
from graphreg import NoMatchError, RegularizerError
from graphreg.passes import BernoulliDropout, HiddenL1, WeightL2
from lacking import needs_result


def net() -> nn.Sequential:
    layers = {"a": nn.Linear(4, 6), "act": nn.Tanh(), "b": nn.Linear(6, 5), "act_b": nn.Tanh(), "norm": nn.Linear(5, 2)}
    return nn.Sequential(OrderedDict(layers))


def summary(**keywords: Any) -> list[tuple[str, Any, float]]:
    """Name, selector and weight of what the keywords mean, by the names that a plan gives."""
    traced = graphreg.trace(net())
    plan = graphreg.plan(traced, graphreg.from_kwargs(traced, **keywords))
    return [(name, regularizer.pattern, regularizer.weight) for name, regularizer in plan.regularizers.items()]


@pytest.mark.parametrize(("keywords", "found"), [
    ({"dropout": {"act": 0.0, "act_b": 0.2}}, [("dropout", "act", 0.0), ("dropout_1", "act_b", 0.2)]),
    ({"noise": {"act": 0.1, ("a", "b"): 0}}, [("noise", "act", 0.1), ("noise_1", ("a", "b"), 0.0)]),
    ({"dropout": [["act", 0.0], [["a", "b"], 0.2]]}, [("dropout", "act", 0.0), ("dropout_1", ("a", "b"), 0.2)]),
    ({"dropout": [("act", 0.1), ("act", 0.2)]}, [("dropout", "act", 0.1), ("dropout_1", "act", 0.2)]),
    ({"weight_l2": {"a.*": 1e-3, "b.*": 0}}, [("weight_l2", "a.*", 1e-3), ("weight_l2_1", "b.*", 0.0)]),
    ({"weight_l2": [("a.*", 1e-3), ("b.*", 1e-4)]}, [("weight_l2", "a.*", 1e-3), ("weight_l2_1", "b.*", 1e-4)]),
    ({"hidden_l1": {"act": 0.5, "*": 0.1}}, [("hidden_l1", "act", 0.5), ("hidden_l1_1", "*", 0.1)]),
    ({"contractive": {"act": 0.5, "act_b": 0.1}}, [("contractive", "act", 0.5), ("contractive_1", "act_b", 0.1)]),
    ({"WeightL2": {"a.*": 1.0}}, [("weightl2", "a.*", 1.0)]),
    ({"dropout": {"act": None, "act_b": 0.2}}, [("dropout_1", "act_b", 0.2)]),
    ({"dropout": {"act": 0.1, "a": False, "act_b": 0.2}}, [("dropout", "act", 0.1), ("dropout_2", "act_b", 0.2)]),
    ({"dropout": {}}, []),
    ({"hidden_dropout": 0.0, "dropout": {"act": 0.0}}, [("dropout", "act", 0.0)]),
    ({"weight_l2": {("norm",): 0.1}, "dropout": {("act", "act_b"): 0.0}}, None),
    ({"regularizers": {"weight_l2": {"a.*": 1e-3, "b.*": 0.0}}}, [("weight_l2", "a.*", 1e-3), ("weight_l2_1", "b.*", 0.0)]),
])  # fmt: skip
def test_maps(keywords: dict[str, Any], found: Any) -> None:
    if found is None:  # a tuple that names exactly the hidden sites is theanets' way to say hidden_dropout
        keywords["weight_l2"] = {("norm.weight",): 0.1}
        found = [("hidden_dropout", "*", 0.0), ("weight_l2", "norm.weight", 0.1)]
    assert summary(**keywords) == found


def test_each_entry_has_a_mean_of_its_own() -> None:
    model, x = net(), torch.randn(3, 4)
    module = graphreg.regularize(model, weight_l2={"a.*": 1.0, "*.weight": 0.5}, dropout={"act": 0.0, "act_b": 0.0})
    penalties = module(x).penalties
    weights = [p for p in model.parameters() if p.dim() > 1]
    torch.testing.assert_close(penalties["weight_l2"], model.a.weight.square().mean())
    torch.testing.assert_close(penalties["weight_l2_1"], 0.5 * torch.stack([w.square().mean() for w in weights]).mean())
    (ours,) = torch.autograd.grad(penalties["weight_l2"], [model.a.weight])
    torch.testing.assert_close(ours, 2 * model.a.weight / model.a.weight.numel())
    assert torch.equal(module(x).output, model(x))
    graphreg.set_strength(module, "dropout", 0.9)  # an entry of 0 is there
    assert not torch.equal(module(x).output, model(x))


def test_an_entry_may_have_options() -> None:
    options = {"a.*": {"weight": 0.1, "reduction": "sum"}, "b.*": {"weight": "1e-4"}}
    (first, second) = graphreg.from_kwargs(net(), weight_l2={"a.*": options["a.*"], "b.*": 0.2})
    assert (first, second) == (WeightL2("a.*", 0.1, reduction="sum", name="weight_l2"), WeightL2("b.*", 0.2, name="weight_l2"))
    with pytest.raises(RegularizerError, match=r"WeightL2: weight is '1e-4'; .*Write weight_l2=\{'b\.\*': 0\.1\}"):
        graphreg.from_kwargs(net(), weight_l2=options)


NUMBERS = [
    0.25, Fraction(1, 4), np.float32(0.25), np.float64(0.25), np.array(0.25), torch.tensor(0.25), torch.tensor(0.25, dtype=torch.float16),
]  # fmt: skip


@pytest.mark.parametrize("number", NUMBERS, ids=lambda n: f"{type(n).__name__} {getattr(n, 'dtype', '')}")
def test_what_is_a_number(number: Any) -> None:
    model = net()
    for regularizer in (
        BernoulliDropout("*", number), *graphreg.from_kwargs(model, hidden_dropout=number),
        *graphreg.from_kwargs(model, dropout={"act": number}), *graphreg.from_kwargs(model, dropout={"weight": number}),
        graphreg.build("dropout", weight=number),
    ):  # fmt: skip
        assert type(regularizer.weight) is float and regularizer.weight == 0.25
    traced = graphreg.trace(nn.Sequential(nn.Linear(2, 2), nn.Dropout()))
    assert graphreg.plan(traced, [], own_dropout=number).native_dropout[0].rate == 0.25


@pytest.mark.parametrize("nothing", [0, 0.0, np.float32(0), np.int64(0), torch.tensor(0.0), torch.tensor(0), None, False], ids=repr)
def test_a_scalar_zero_is_off(nothing: Any) -> None:
    assert graphreg.from_kwargs(net(), hidden_dropout=nothing, weight_l2=nothing, dropout=nothing) == []


@pytest.mark.parametrize("text", ["1e-4", "0.1", " 2 ", "nan"])
def test_a_number_in_quotes(text: str) -> None:
    """YAML reads 1e-4 as a text; the error says so, and what to write where it was given."""
    trap = r"A number in quotes is a string: remove the quotes\. YAML reads 1e-4 as a string, too: write it with a dot, 1\.0e-4\."
    for cure, keywords in (
        ("Write weight_l2=0.1.", {"weight_l2": text}),
        ("Write weight_l2={'a.*': 0.1}.", {"weight_l2": {"a.*": text}}),
        ("Write weight_l2={'weight': 0.1, ...}.", {"weight_l2": {"weight": text, "pattern": "a.*"}}),
    ):
        sentence = rf"^WeightL2: weight is '{text}'; it must be a finite number\. {trap} {re.escape(cure)}$"
        with pytest.raises(RegularizerError, match=sentence):
            graphreg.regularize(net(), **keywords)
    with pytest.raises(RegularizerError, match=rf"^WeightL2: weight is '{text}'.* {trap} Write WeightL2\('\*', 0\.1\): the selector first"):
        WeightL2("*", text)  # type: ignore[arg-type]
    with pytest.raises(RegularizerError, match=rf"^own_dropout='{text}' is not allowed; .*{trap}$"):
        graphreg.regularize(net(), own_dropout=text)  # type: ignore[arg-type]


@pytest.mark.parametrize(("value", "why"), [
    (nn.Parameter(torch.tensor(0.1)), r"tensor that requires grad, and graphreg would not train it: give weight\.item\(\)"),
    (torch.tensor([0.1]), "must be a finite number"), (torch.tensor(0.1, device="meta"), "must be a finite number"),
    (torch.tensor(float("nan")), "must be a finite number"), (torch.tensor(1j), "must be a finite number"),
    ("many", "must be a finite number. Write"),
])  # fmt: skip
def test_what_is_no_number(value: Any, why: str) -> None:
    for keywords in ({"hidden_dropout": value}, {"dropout": {"act": value}}, {"dropout": {"weight": value}}):
        with pytest.raises(RegularizerError, match=why):
            graphreg.regularize(net(), **keywords)


def refused(**keywords: Any) -> str:
    with pytest.raises((RegularizerError, NoMatchError)) as error:
        graphreg.regularize(net(), **keywords)
    return str(error.value)


@pytest.mark.parametrize(("keywords", "says"), [
    ({"weight_l2": {"wieght": 0.1}}, ["'wieght' matches no parameter", "the option that it resembles is 'weight'"]),
    ({"dropout": {"patern": 0.1, "act": 0.1}}, ["'patern' matches no value", "the option that it resembles is 'pattern'"]),
    ({"weight_l2": {"wieght": 0.1, "patern": "a.*"}}, ["weight is 'a.*'", "the option that it resembles is 'pattern'"]),
    ({"weight_l2": {"wieght": 0.1, "pattern": "a.*"}}, ["has no 'strength'", "'wieght' is no option. Near options: weight"]),
    ({"weight_l2": {"weight": 0.1, "patern": "a.*"}}, ["WeightL2 has no option 'patern'. Near options: pattern"]),
    (
        {"recurrent_norm": {"norm": 0.1}},
        ["has no 'strength'", "'norm' is the name of an option and of a site; for the site write {('norm',): 0.1}"],
    ),
    ({"hidden_dropout": {"act": 0.1}}, ["has no 'strength'", "or dropout={selector: rate}"]),
    ({"weight_l2": ["a.*", "b.*"]}, ["weight_l2=['a.*', 'b.*'] is not allowed; give a weight, or a dict of selectors to weights"]),
    ({"weight_l2": {"nowhere": 0.1}}, ["'nowhere' matches no parameter"]),
])  # fmt: skip
def test_what_a_dict_was_meant_as(keywords: dict[str, Any], says: list[str]) -> None:
    sentence = refused(**keywords)
    assert [part for part in says if part not in sentence] == []
    assert "nowhere" not in sentence or "resembles" not in sentence


def test_a_misspelled_option_under_another_missing() -> None:
    with pytest.warns(UserWarning, match="the option that it resembles is 'weight'"):
        module = graphreg.regularize(net(), weight_l2={"wieght": 0.1, "a.*": 0.2}, missing="warn")
    assert list(module(torch.zeros(1, 4)).penalties) == ["weight_l2", "weight_l2_1"]


@needs_result
def test_a_map_in_a_backend_and_as_a_pass() -> None:
    model, x = net(), torch.randn(3, 4)
    options = {"inner": "eager", "penalties": "attach", "scale": 1.0}
    compiled = torch.compile(model, backend=graphreg.backend(**options, weight_l2={"a.*": 1.0, "b.*": 0.0}))
    compiled(x)
    assert graphreg.strengths(compiled) == {"weight_l2": 1.0, "weight_l2_1": 0.0}
    made = graphreg.as_pass(dropout={"act": 0.0, "act_b": 0.5})(torch.fx.symbolic_trace(model)).graph_module
    assert graphreg.strengths(made) == {"dropout": 0.0, "dropout_1": 0.5}


def test_the_values_of_a_map_are_of_its_keyword() -> None:
    """A penalty's value by hand, beside what must not change: the model's own output."""
    model, x = net(), torch.randn(3, 4)
    module = graphreg.regularize(model, hidden_l1={"act": 1.0, "act_b": 2.0})
    act: Tensor = model.act(model.a(x))
    act_b = model.act_b(model.b(act))
    torch.testing.assert_close(module(x).penalties, {"hidden_l1": act.abs().mean(), "hidden_l1_1": 2 * act_b.abs().mean()})
    assert graphreg.from_kwargs(model, hidden_l1={"act": 1.0})[0] == HiddenL1("act", 1.0, name="hidden_l1")
