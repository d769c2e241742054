"""The keyword grammar against theanets': the same keywords give the same regularizers, or differ on purpose."""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from functools import cache
from types import MappingProxyType
from typing import Any

import pytest
import torch

import graphreg
from graphreg.passes import GaussianNoise, WeightL2
from theanets_nets import ABSENT, GOLDEN, NETWORKS, PRESENT, Record, Row, inputs, keywords, matched, network, selected

Found = list[tuple[str, set[str], float]]  # class, what it selects by theanets' names, weight


def concerns(record: Record) -> bool:
    """Whether graphreg has any of a record's keywords, or there are none."""
    call = ast.parse(f"dict({record['kwargs']})", mode="eval").body
    assert isinstance(call, ast.Call)
    names = {str(keyword.arg).lower() for keyword in call.keywords}
    return not names or not names <= ABSENT


RECORDS: Mapping[str, Record] = MappingProxyType({record["id"]: record for record in GOLDEN["from_kwargs"] if concerns(record)})


def given(record: Record) -> tuple[dict[str, Any], Any]:
    """The keywords in graphreg's words, and ``rng``: of theanets' grammar, here an option of ``regularize``."""
    found = keywords(record["kwargs"], record["network"])
    return found, found.pop("rng", None)


@cache
def traced_network(name: str) -> graphreg.Traced:
    return graphreg.trace(network(name))


def ours(record: Record, **changed: Any) -> Found:
    """What graphreg makes of a record's keywords."""
    traced = traced_network(record["network"])
    found = graphreg.from_kwargs(traced, **given(record)[0] | changed)
    return [(type(one).__name__, selected(traced, one, record["network"]), one.weight) for one in found]


def theirs(record: Record) -> Found:
    """What theanets made of them, in so far as graphreg has the classes."""
    kept = [one for one in record["result"] if one["cls"].lower() not in ABSENT]
    return [(one["cls"], matched(one["cls"], one["pattern"], record["network"]), one["weight"]) for one in kept]


def agrees(record: Record) -> None:
    """Assert the same classes, sites and weights in the same order; where theanets raises, an error."""
    if "error" in record:
        with pytest.raises(graphreg.GraphRegError):
            ours(record)
    else:
        assert ours(record) == theirs(record)


# --- what differs on purpose ----------------------------------------------------------------------------------------

HIDDEN = {"hid1:out", "hid2:out", "hid3:out"}
ALL = HIDDEN | {"in:out", "out:out"}
WEIGHTS = {"hid1.w", "hid2.w", "hid3.w", "out.w"}


def gives(*found: tuple[str, set[str], float]) -> Callable[[Record], None]:
    """graphreg makes this of the keywords."""

    def check(record: Record) -> None:
        assert ours(record) == list(found)

    return check


def raises(kind: type[graphreg.GraphRegError], text: str) -> Callable[[Record], None]:
    """graphreg refuses the keywords, and says what is wrong; theanets took them without a word."""

    def check(record: Record) -> None:
        assert "error" not in record
        with pytest.raises(kind, match=text):
            graphreg.regularize(network(record["network"]), **given(record)[0])

    return check


DELIBERATE: dict[str, tuple[Row, Callable[[Record], None]]] = {
    "dropout_scalar": (Row.HIDDEN, gives(("BernoulliDropout", HIDDEN, 0.2))),
    "noise_scalar": (Row.HIDDEN, gives(("GaussianNoise", HIDDEN, 0.2))),
    "class_name_noise": (Row.HIDDEN, gives(("GaussianNoise", HIDDEN, 0.1), ("BernoulliDropout", {"hid1:out"}, 0.2))),
    "dropout_negative": (Row.RANGE, raises(graphreg.RegularizerError, r"weight=-0\.2 is not allowed; weight must be in \[0, 1\)")),
    "dropout_ge_1": (Row.RANGE, raises(graphreg.RegularizerError, r"weight=1\.0 is not allowed; weight must be in \[0, 1\)")),
    "noise_negative": (Row.RANGE, raises(graphreg.RegularizerError, r"weight=-0\.2 is not allowed; weight must be 0 or more")),
    "dropout_hidden_nohid": (Row.NOTHING, raises(graphreg.NoMatchError, "has none of the default sites")),
    "base_class": (Row.NOTHING, raises(graphreg.NoMatchError, "'regularizer'")),
    "unknown": (Row.NOTHING, raises(graphreg.NoMatchError, "'weight_l3'.* Near keys: .*weight_l2")),
    "single": (Row.NOTHING, gives(("WeightL2", WEIGHTS, 0.1))),
    "dropout_two_in": (
        Row.DISJOINT, gives(("BernoulliDropout", {"in:out", "in2:out"}, 0.1), ("BernoulliDropout", {"hid1:out", "hid2:out"}, 0.2)),
    ),
    "noise_two_in": (
        Row.DISJOINT, gives(("GaussianNoise", {"in:out", "in2:out"}, 0.1), ("GaussianNoise", {"hid1:out", "hid2:out"}, 0.2)),
    ),
    "weight_l2_zero": (Row.ZERO, gives()),
    "weight_l2_none": (Row.ZERO, gives()),
    "dropout_dict_zero": (Row.ZERO_IN_A_MAP, gives(("BernoulliDropout", ALL, 0.0), ("BernoulliDropout", {"hid1:out"}, 0.0))),
    "noise_dict_zero": (Row.ZERO_IN_A_MAP, gives(("GaussianNoise", ALL, 0.0), ("GaussianNoise", {"hid1:out"}, 0.0))),
    "dropout_dict_zero_tuple": (Row.ZERO_IN_A_MAP, gives(("BernoulliDropout", {"in:out"}, 0.0))),
    "noise_dict_zero_tuple": (Row.ZERO_IN_A_MAP, gives(("GaussianNoise", {"in:out"}, 0.0))),
    "list": (Row.COMBINED, gives(("BernoulliDropout", HIDDEN, 0.5), ("WeightL1", WEIGHTS, 0.3), ("WeightL2", WEIGHTS, 0.1))),
    "list_empty": (Row.COMBINED, gives(("WeightL1", WEIGHTS, 0.3))),
}  # fmt: skip
AGREEING = [record for record in RECORDS if record not in DELIBERATE]


@pytest.mark.parametrize("record", AGREEING)
def test_keywords_agree(record: str) -> None:
    agrees(RECORDS[record])


@pytest.mark.parametrize("record", DELIBERATE)
def test_keywords_differ_on_purpose(record: str) -> None:
    with pytest.raises((AssertionError, graphreg.GraphRegError, pytest.fail.Exception)):  # a row must not cover up an agreement
        agrees(RECORDS[record])
    DELIBERATE[record][1](RECORDS[record])


@pytest.mark.parametrize("record", GOLDEN["from_kwargs"], ids=lambda record: record["id"])
def test_each_record_is_covered_once(record: Record) -> None:
    classes = {one["cls"].lower() for one in record.get("result", [])}
    left_out = bool(classes) and classes <= ABSENT
    assert [*AGREEING, *DELIBERATE].count(record["id"]) == (not left_out)
    assert classes <= PRESENT | ABSENT | {"regularizer"}


def test_every_deliberate_difference_has_a_record() -> None:
    assert DELIBERATE.keys() <= RECORDS.keys()


# --- what surrounds the records -------------------------------------------------------------------------------------


def test_theanets_keys_are_registered() -> None:
    """Every key and class name of theanets' that is present means the class of that name, in any case."""
    known = GOLDEN["observed"]["registry"]["keys"]
    classes = {key: graphreg.registered()[key].__name__ for key in known if key in PRESENT}
    assert classes == {key: known[key] for key in classes}
    assert isinstance(graphreg.build("Weight_DECAY", weight=0.1), WeightL2)


@pytest.mark.parametrize("record", ["class_name_noise", "rng_default", "rng_none"])
def test_rng_is_an_option_of_regularize(record: str) -> None:
    kwargs, rng = given(RECORDS[record])
    module = graphreg.regularize(network("ff"), rng=rng, **kwargs)
    assert list(graphreg.strengths(module).values()) == [one["weight"] for one in RECORDS[record]["result"]]


def test_an_rng_of_another_kind_is_refused_at_once() -> None:
    """theanets takes a numpy RandomState here and fails when it builds the graph."""
    kwargs, rng = given(RECORDS["rng_randomstate"])
    assert type(rng).__name__ == "RandomState"
    assert GOLDEN["observed"]["rng-randomstate"]["error"] == "TypeError"
    with pytest.raises(graphreg.RegularizerError, match=r"rng=.* is not allowed"):
        graphreg.regularize(network("ff"), rng=rng, **kwargs)


@pytest.mark.parametrize("keywords", [{"hidden_noise": {"weight": 0}}, {"regularizers": GaussianNoise("*", 0)}])
def test_weight_zero_in_a_dict_or_an_instance_is_spliced(keywords: dict[str, Any]) -> None:
    """Row.ZERO, its other half: off until it is raised."""
    model = network("ff")
    traced = graphreg.trace(model)
    module = graphreg.rewrite(traced, graphreg.plan(traced, graphreg.from_kwargs(traced, **keywords)))
    ((name, weight),) = graphreg.strengths(module).items()
    assert weight == 0
    assert torch.equal(module(*inputs("ff")).output, model(*inputs("ff")))
    graphreg.set_strength(module, name, 0.5)
    assert not torch.equal(module(*inputs("ff")).output, model(*inputs("ff")))


@pytest.mark.parametrize("key", ["bernoullidropout", "gaussiannoise"])
def test_splices_default_to_hidden_sites(key: str) -> None:
    """Row.HIDDEN: theanets' ``*:out`` takes inputs and outputs too, and is still to be had by writing it."""
    assert GOLDEN["observed"]["defaults"][graphreg.registered()[key].__name__]["pattern"] == "*:out"
    traced = graphreg.trace(network("ff"))
    assert selected(traced, graphreg.build(key, weight=0.1), "ff") == HIDDEN
    everywhere = {output for output in NETWORKS["ff"]["output_order"] if output.endswith(":out")}
    assert selected(traced, graphreg.build(key, pattern="*:out", weight=0.1), "ff") == everywhere


def test_hidden_sites_by_name_take_the_place_of_the_keyword() -> None:
    """A tuple that names a role's sites replaces that role's rate, as ``dropout_dict_same_tuple`` records for the input."""
    traced = graphreg.trace(network("ff"))
    found = graphreg.from_kwargs(traced, hidden_dropout=0.2, dropout={("hid1:out", "hid2:out", "hid3:out"): 0.4})
    assert [(selected(traced, one, "ff"), one.weight) for one in found] == [(HIDDEN, 0.4)]
