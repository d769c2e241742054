"""Penalties against theanets: every case of theanets.json agrees to 1e-9, value and gradients, or is a deliberate difference."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphreg
from graphreg.passes import HiddenL1, RecurrentNorm, WeightL1, WeightL2
from theanets_nets import (
    GOLDEN,
    NETWORKS,
    PRESENT,
    Record,
    Row,
    Telescoping,
    assert_close,
    assert_gradients,
    gradients,
    inputs,
    loss,
    matched,
    network,
    options,
    output_name,
    plus,
    probe,
    seen,
    selector,
    squared_norms,
    tensor,
    traced,
    weights,
)


def present(case: Record) -> list[Record]:
    """The regularizers of a case that graphreg has."""
    return [regularizer for regularizer in case["regularizers"] if regularizer["key"] in PRESENT]


def absent(case: Record) -> list[Record]:
    return [regularizer for regularizer in case["regularizers"] if regularizer["key"] not in PRESENT]


CASES: Mapping[str, Record] = MappingProxyType({case["id"]: case for case in GOLDEN["cases"] if present(case)})


def built(case: Record) -> list[graphreg.Regularizer]:
    """The regularizers of a case, by key and options, as theanets built them."""
    found = []
    for regularizer in present(case):
        given = {k: tuple(v) if k in regularizer["kwargs_tuple"] else v for k, v in regularizer["kwargs"].items()}
        found.append(graphreg.build(regularizer["key"], **options(regularizer["key"], given, case["network"])))
    return found


def agrees(case: Record, missing: Any = "error", made: Any = built) -> None:
    """Assert that graphreg selects what theanets selects, and computes the same terms, total and gradients."""
    name, trace = case["network"], traced(case["network"])
    model = trace.model
    if any("error" in regularizer for regularizer in present(case)):
        with pytest.raises(graphreg.GraphRegError):
            graphreg.rewrite(trace, graphreg.plan(trace, made(case), missing))(*inputs(name))
        return
    plan = graphreg.plan(trace, made(case), missing)
    _selects(case, plan)
    module = graphreg.rewrite(trace, plan)
    _total(case, model, *module(*inputs(name)))
    for strength in graphreg.strengths(module):
        graphreg.set_strength(module, strength, 1.0)  # a term of theanets is unweighted
    terms = module(*inputs(name)).penalties
    for golden, (strength, term) in zip(present(case), terms.items(), strict=True):
        assert_close(term, golden["term"], strength)
        assert_gradients(term, model, golden["grad"], strength)


def _selects(case: Record, plan: graphreg.Plan) -> None:
    name = case["network"]
    for golden, strength in zip(present(case), plan.regularizers, strict=True):
        assert {output_name(edit.site, name) for edit in plan.of(strength)} == recorded(golden, name)


def recorded(regularizer: Record, name: str) -> set[str]:
    """What a regularizer acted on in theanets: outputs, or those of the matched parameters that have 2 dims."""
    if regularizer["matched_outputs"] is not None:
        return set(regularizer["matched_outputs"])
    return set(weights(name)).intersection(regularizer["matched_params"])


def _total(case: Record, model: nn.Module, output: Tensor, penalties: dict[str, Tensor]) -> None:
    """The regularized loss and its gradients; what regularizers that graphreg lacks contributed is taken off theanets'."""
    total = loss(case["network"], output) + sum(penalties.values())
    others = sum(regularizer["kwargs"]["weight"] * float(regularizer["term"]) for regularizer in absent(case))
    assert_close(total, float(case["loss_total"]) - others, "total loss")
    gradient = NETWORKS[case["network"]]["grad_loss"]
    for regularizer in present(case):
        gradient = plus(gradient, regularizer["kwargs"]["weight"], regularizer["grad"])
    assert_gradients(total, model, gradient, "total loss")


def asked(case: Record, pattern: Any) -> Record:
    """The case with another selector, in theanets' words."""
    other = copy.deepcopy(case)
    for regularizer in other["regularizers"]:
        regularizer["kwargs"]["pattern"] = pattern
        regularizer["kwargs_tuple"] = []
    return other


# --- what differs on purpose ----------------------------------------------------------------------------------------


def nothing(case: Record) -> None:
    """A string that selects nothing is an error, also beside others; where it is allowed, theanets' numbers come out."""
    pattern = case["regularizers"][0]["kwargs"].get("pattern", "has none of the default sites")
    culprit = pattern if isinstance(pattern, str) else pattern[-1]
    with pytest.raises(graphreg.NoMatchError, match=re.escape(culprit)):
        graphreg.regularize(network(case["network"]), built(case))
    agrees(case, missing="ignore")


def bare_layer(case: Record) -> None:
    """``hid1`` names the value of the layer, as ``hid1:out`` does; theanets finds nothing."""
    name = case["network"]
    module = graphreg.regularize(network(name), HiddenL1("hid1", 1.0))
    by_hand = tensor(NETWORKS[name]["outputs"]["hid1:out"]).abs().mean()
    assert_close(module(*inputs(name)).penalties["hidden_l1"], by_hand, "hid1")


def tuple_star(case: Record) -> None:
    """A ``*`` in a tuple is the default as a ``*`` alone is; every output by its name is what theanets computed."""
    module = graphreg.regularize(network(case["network"]), built(case))
    default = CASES["hidden-l1/default"]["regularizers"][0]["term"]
    assert_close(module(*inputs(case["network"])).penalties["hidden_l1"], 0.3 * default, "('*',)")
    agrees(asked(case, case["regularizers"][0]["matched_outputs"]))


def two_inputs(case: Record) -> None:
    """The second input is no hidden site; selected by name, it adds to the mean as in theanets."""
    name = case["network"]
    module = graphreg.regularize(network(name), HiddenL1("*", 1.0))
    hid1, hid2 = (tensor(NETWORKS[name]["outputs"][output]).abs().mean() for output in ("hid1:out", "hid2:out"))
    assert_close(module(*inputs(name)).penalties["hidden_l1"], (hid1 + hid2) / 2, "hidden sites")
    agrees(asked(case, case["regularizers"][0]["matched_outputs"]))


def telescoping(case: Record) -> list[graphreg.Regularizer]:
    """theanets' code of RecurrentNorm, in graphreg's engine."""
    (golden,) = case["regularizers"]
    return [Telescoping(selector(golden["kwargs"]["pattern"], case["network"]), golden["kwargs"]["weight"])]


def squared(case: Record) -> None:
    """Without the square theanets' numbers come out; with it, those of its documentation, also in the gradients."""
    agrees(case, made=telescoping)
    name, model = case["network"], network(case["network"])
    outputs, found = case["regularizers"][0]["matched_outputs"], probe(name)
    module = graphreg.regularize(model, built(case), found)
    ours = module(*inputs(name)).penalties["recurrent_norm"]
    values = seen(found, traced(name), name)
    by_hand = 0.3 * squared_norms({output: values[output] for output in outputs})
    assert_close(ours, by_hand, "recurrent_norm")
    assert_close(ours, 0.3 * squared_norms({output: tensor(NETWORKS[name]["outputs"][output]) for output in outputs}), "recurrent_norm")
    assert_gradients(ours, model, gradients(by_hand, model), "recurrent_norm")


def squared_everywhere(case: Record) -> None:
    """A recurrent penalty asks for a selector; every output by its name is what theanets' default means."""
    with pytest.raises(graphreg.RegularizerError, match="RecurrentNorm needs a selector"):
        built(case)
    squared(asked(case, case["regularizers"][0]["matched_outputs"]))


def trains_nothing(case: Record) -> None:
    """Nothing in the network changes its input. Beside another site the input counts, and its term is theanets'."""
    with pytest.raises(graphreg.RegularizerError, match="no parameter that can train reaches its sites"):
        graphreg.regularize(network(case["network"]), built(case))
    (golden,) = case["regularizers"]
    state = golden["key"] == "recurrent_state"
    other = CASES[f"{case['id'].partition('/')[0]}/rnn"]["regularizers"][0]
    model, both = network(case["network"]), ("in_", "hid1")
    module = graphreg.regularize(model, graphreg.build("recurrent_state", pattern=both, weight=1.0) if state else Telescoping(both, 1.0))
    (mean,) = module(*inputs(case["network"])).penalties.values()
    assert_close(2 * mean - other["term"], golden["term"], "in:out")
    assert_gradients(2 * mean, model, other["grad"], "in:out")
    if not state:
        by_hand = squared_norms({"in:out": inputs(case["network"])[0], "hid1:out": tensor(NETWORKS["rnn"]["outputs"]["hid1:out"])})
        squares = graphreg.regularize(model, RecurrentNorm(both, 1.0))(*inputs(case["network"])).penalties["recurrent_norm"]
        assert_close(squares, by_hand, "recurrent_norm")


def one_step(case: Record) -> None:
    """A single step has no neighbour: 0, and no gradient; theanets takes the mean of nothing."""
    name, model = case["network"], network(case["network"])
    output, penalties = graphreg.regularize(model, built(case))(*inputs(name))
    (penalty,) = penalties.values()
    assert case["regularizers"][0]["term"] == "nan" and penalty.item() == 0
    assert_close(loss(name, output) + penalty, NETWORKS[name]["loss_unregularized"], "total loss")
    assert_gradients(penalty, model, dict.fromkeys(dict(model.named_parameters())), "recurrent penalty")


def wrt_nothing(case: Record) -> None:
    """A ``wrt`` that selects nothing is an error; theanets differentiates with respect to nothing, and gives nan."""
    assert case["regularizers"][0]["term"] == "nan"
    with pytest.raises(graphreg.NoMatchError, match=r"wrt of Contractive: 'nope' matches no value of"):
        graphreg.regularize(network(case["network"]), built(case))


def the_hidden_sites(like: str) -> Callable[[Record], None]:
    """Where theanets crashes, the default is the hidden sites: another case's term and gradients."""

    def computes(case: Record) -> None:
        assert "error" in case["regularizers"][0]
        model, golden = network(case["network"]), CASES[like]["regularizers"][0]
        module = graphreg.regularize(model, built(case))
        (term,) = module(*inputs(case["network"])).penalties.values()
        assert_close(term / case["regularizers"][0]["kwargs"]["weight"], golden["term"], like)
        assert_gradients(term / case["regularizers"][0]["kwargs"]["weight"], model, golden["grad"], like)

    return computes


def unequal_inputs(case: Record) -> None:
    """theanets stacks the derivatives, and crashes where they differ in shape; ours is the mean of its terms for either input."""
    model, (one, other) = network(case["network"]), (CASES[f"contractive/two-in-uneq-{x}"]["regularizers"][0] for x in ("in", "in2"))
    (term,) = graphreg.regularize(model, built(case))(*inputs(case["network"])).penalties.values()
    zeros = {path: torch.zeros_like(parameter) for path, parameter in model.named_parameters()}
    assert_close(2 * term / 0.3, one["term"] + other["term"], "both inputs")
    assert_gradients(2 * term / 0.3, model, plus(plus(zeros, 1.0, one["grad"]), 1.0, other["grad"]), "both inputs")


DELIBERATE: dict[str, tuple[Row, Callable[[Record], None]]] = {
    "weight-l1/biases-only": (Row.NOTHING, nothing),
    "weight-l1/list": (Row.NOTHING, nothing),
    "weight-l1/nothing": (Row.NOTHING, nothing),
    "weight-l1/output-name": (Row.NOTHING, nothing),
    "weight-l2/biases-only": (Row.NOTHING, nothing),
    "weight-l2/list": (Row.NOTHING, nothing),
    "weight-l2/output-name": (Row.NOTHING, nothing),
    "hidden-l1/nohid": (Row.NOTHING, nothing),
    "hidden-l1/nothing": (Row.NOTHING, nothing),
    "hidden-l1/bare-layer": (Row.VALUES, bare_layer),
    "hidden-l1/tuple-star": (Row.VALUES, tuple_star),
    "hidden-l1/two-in": (Row.DISJOINT, two_inputs),
    "recurrent-norm/rnn": (Row.SQUARED, squared),
    "recurrent-norm/rnn-relu": (Row.SQUARED, squared),
    "recurrent-norm/rnn-pre": (Row.SQUARED, squared),
    "recurrent-norm/gru": (Row.SQUARED, squared),
    "recurrent-norm/gru-all": (Row.SQUARED, squared),
    "recurrent-norm/default": (Row.SQUARED, squared_everywhere),
    "recurrent-norm/in": (Row.TRAINS, trains_nothing),
    "recurrent-state/in": (Row.TRAINS, trains_nothing),
    "recurrent-norm/nothing": (Row.NOTHING, nothing),
    "recurrent-state/nothing": (Row.NOTHING, nothing),
    "recurrent-norm/T1": (Row.SEQUENCES, one_step),
    "recurrent-state/T1": (Row.SEQUENCES, one_step),
    "contractive/wrt-nothing": (Row.CONTRACTIVE, wrt_nothing),
    "contractive/default-pattern": (Row.CONTRACTIVE, the_hidden_sites("contractive/star")),
    "contractive/two-in-star": (Row.DISJOINT, the_hidden_sites("contractive/two-in-several")),
    "contractive/two-in-uneq-all": (Row.CONTRACTIVE, unequal_inputs),
}
AGREEING = [case for case in CASES if case not in DELIBERATE]


@pytest.mark.parametrize("case", AGREEING)
def test_a_case_agrees(case: str) -> None:
    agrees(CASES[case])


@pytest.mark.parametrize("case", DELIBERATE)
def test_a_case_differs_on_purpose(case: str) -> None:
    with pytest.raises((AssertionError, graphreg.GraphRegError, pytest.fail.Exception)):  # a row must not cover up an agreement
        agrees(CASES[case])
    DELIBERATE[case][1](CASES[case])


def test_each_case_is_covered_once_and_every_deliberate_difference_has_a_case() -> None:
    for case in GOLDEN["cases"]:
        concerns = any(regularizer["key"] in PRESENT for regularizer in case["regularizers"])
        assert [*AGREEING, *DELIBERATE].count(case["id"]) == concerns, case["id"]
        assert [other["id"] for other in GOLDEN["cases"]].count(case["id"]) == 1, case["id"]
    assert DELIBERATE.keys() <= CASES.keys()


# --- what the cases stand on ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_computes_what_theanets_does(name: str) -> None:
    model, found = network(name), probe(name)
    output = graphreg.regularize(model, found)(*inputs(name)).output
    values = seen(found, traced(name), name)
    assert values.keys() == NETWORKS[name]["outputs"].keys()
    for key, golden in NETWORKS[name]["outputs"].items():
        assert_close(values[key], golden, key)
    value = loss(name, output)
    assert_close(value, NETWORKS[name]["loss_unregularized"], "loss")
    assert_gradients(value, model, NETWORKS[name]["grad_loss"], "loss")


def test_theanets_rule_is_written_down_right() -> None:
    """``matched``, which the keyword records are held against, gives what theanets recorded."""
    for case in CASES.values():
        for regularizer in present(case) if case["id"] != "contractive/default-pattern" else ():  # that crashes before it selects
            name, pattern = case["network"], regularizer["kwargs"].get("pattern", "*")
            assert matched(regularizer["cls"], pattern, name) == recorded(regularizer, name), case["id"]


@pytest.mark.parametrize(("kind", "fact"), [(WeightL2, "l2_doc_sum"), (WeightL1, "l1_doc_sum")])
def test_the_sum_that_theanets_documents_is_an_option(kind: Any, fact: str) -> None:
    """theanets' code averages, as graphreg does by default; its documentation sums each parameter and averages over the four."""
    golden = GOLDEN["observed"]["weight-vs-doc"]
    module = graphreg.regularize(network(golden["network"]), kind("*", 1.0, reduction="sum"))
    (term,) = module(*inputs(golden["network"])).penalties.values()
    assert_close(term / 4, golden[fact], fact)
