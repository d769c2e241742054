"""Splices against theanets: its frozen draws, injected, give its numbers to 1e-9; graphreg's own draws have its moments."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import graphreg
from graphreg.passes import BernoulliDropout, GaussianNoise, HiddenL1, RecurrentNorm
from theanets_nets import (
    ABSENT,
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
    keywords,
    loss,
    matched,
    network,
    output_name,
    plus,
    probe,
    seen,
    selected,
    selector,
    site_name,
    squared_norms,
    tensor,
)


def present(sample: Record) -> list[Record]:
    return [regularizer for regularizer in sample["regularizers"] if regularizer["cls"].lower() in PRESENT]


def absent(sample: Record) -> list[Record]:
    return [regularizer for regularizer in sample["regularizers"] if regularizer["cls"].lower() not in PRESENT]


SAMPLES: dict[str, Record] = {sample["id"]: sample for sample in GOLDEN["samples"] if present(sample)}
MOMENTS: dict[str, Record] = {record["id"]: record for record in GOLDEN["stochastic"] if record["cls"].lower() in PRESENT}


# --- theanets' draws in graphreg's splices --------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Drawn:
    """Stands in for graphreg.Noise: one draw, already made."""

    draw: Tensor

    def keep(self, z: Tensor, p: Tensor) -> Tensor:
        return self.draw.to(z.dtype, copy=True)

    def normal(self, z: Tensor) -> Tensor:
        return self.draw


class Frozen(graphreg.Splice):
    """A splice of graphreg, its own formula and all, on a draw of theanets'; ``copies`` keeps the value before it."""

    inner: Any = None
    drawn: Any = None
    copy: str = ""
    copies: Any = None

    def __call__(self, z: Tensor, weight: Tensor) -> Tensor:
        self.copies[self.copy] = z
        spliced: Tensor = self.inner(z, weight=weight, noise=self.drawn)
        return spliced


def frozen(plan: graphreg.Plan, sample: Record, copies: dict[str, Tensor]) -> graphreg.Plan:
    """The plan with theanets' draws in its splices."""
    edits = [_frozen(edit, plan, sample, copies) if isinstance(edit.regularizer, graphreg.Splice) else edit for edit in plan.edits]
    return dataclasses.replace(plan, edits=tuple(edits))


def _frozen(edit: Any, plan: graphreg.Plan, sample: Record, copies: dict[str, Tensor]) -> Any:
    """A splice with the draw that is inferred from the values that theanets stored before and after it."""
    output, splices, inner = output_name(edit.site, sample["network"]), plan.splices(edit.site.name), edit.regularizer
    place = splices.index(edit)
    before, after = _stored(sample, output, splices)[place : place + 2]
    draw = after != 0 if isinstance(inner, BernoulliDropout) else (after - before) / inner.weight
    splice = Frozen("*", inner.weight, inner=inner, drawn=Drawn(draw), copy=_copy(output, edit), copies=copies)
    return dataclasses.replace(edit, regularizer=splice)


def _copy(output: str, edit: Any) -> str:
    """theanets' name for the value before a splice."""
    return f"{output}-{'predrop' if isinstance(edit.regularizer, BernoulliDropout) else 'prenoise'}"


def _stored(sample: Record, output: str, splices: Sequence[Any]) -> list[Tensor]:
    """The values of an output: before each of its splices, and after the last."""
    values = [tensor(sample["outputs"][name]) for name in (*(_copy(output, edit) for edit in splices), output)]
    if output.startswith("in"):  # two dropouts save one copy, the second's: what an input was before the first is known
        values[0] = tensor(NETWORKS[sample["network"]]["outputs"][output])
    return values


@dataclasses.dataclass(frozen=True)
class Run:
    """One call of a sample's network with theanets' draws."""

    model: torch.nn.Module
    plan: graphreg.Plan
    values: dict[str, Tensor]  # every output and saved copy, by theanets' name
    output: Tensor
    penalties: dict[str, Tensor]


def run(sample: Record, regularizers: Sequence[graphreg.Regularizer] | None = None) -> Run:
    """Run a sample's keywords (or other regularizers) on its draws."""
    name = sample["network"]
    model, copies, found = network(name), dict[str, Tensor](), probe(name)
    traced = graphreg.trace(model)
    if regularizers is None:
        regularizers = graphreg.from_kwargs(traced, **keywords(sample["kwargs"], name))
    plan = graphreg.plan(traced, [*regularizers, found])
    module = graphreg.rewrite(traced, frozen(plan, sample, copies))
    output, penalties = module(*inputs(name))
    del penalties[found.name]
    return Run(model, plan, seen(found, traced, name) | copies, output, penalties)


# --- samples --------------------------------------------------------------------------------------------------------


def agrees(sample: Record, regularizers: Sequence[graphreg.Regularizer] | None = None) -> None:
    """Assert the same regularizers, sites, outputs, saved copies, terms, loss and gradients."""
    ran = run(sample, regularizers)
    _same_regularizers(sample, ran.plan)
    assert ran.values.keys() == sample["outputs"].keys()
    for name, golden in sample["outputs"].items():
        assert_close(ran.values[name], golden, name)
    base = loss(sample["network"], ran.output)
    assert_close(base, sample["loss_base"], "loss without penalties")
    penalized = [golden for golden in present(sample) if golden["grad"] is not None]
    for golden, (name, penalty) in zip(penalized, ran.penalties.items(), strict=True):
        assert_close(penalty / golden["weight"], golden["term"], name)
        assert_gradients(penalty / golden["weight"], ran.model, golden["grad"], name)
    gradient, total = sample["grad_total"], sample["loss_total"]
    for golden in absent(sample):  # what graphreg lacks is taken off theanets' total
        gradient, total = plus(gradient, -golden["weight"], golden["grad"]), total - golden["weight"] * golden["term"]
    ours = base + sum(ran.penalties.values())
    assert_close(ours, total, "total loss")
    assert_gradients(ours, ran.model, gradient, "total loss")


def _same_regularizers(sample: Record, plan: graphreg.Plan) -> None:
    name = sample["network"]
    ours = [
        (getattr(one, "theirs", type(one).__name__), one.weight, {output_name(edit.site, name) for edit in plan.of(key)})
        for key, one in list(plan.regularizers.items())[:-1]  # the last is the probe
    ]
    assert ours == [(golden["cls"], golden["weight"], matched(golden["cls"], golden["pattern"], name)) for golden in present(sample)]


def noise_before_the_activation(sample: Record) -> None:
    """Noise on ``hid1.pre`` reaches ``hid1`` and all that follows, since it is a value of the graph; theanets noises a copy."""
    model: Any = network("ff")
    ran, noised = run(sample), tensor(sample["outputs"]["hid1:pre"])
    assert_close(ran.values["hid1:pre"], noised, "hid1:pre")
    assert_close(ran.values["hid1:out"], noised.tanh(), "hid1:out")
    assert_close(ran.penalties["hidden_l1"], 0.3 * (noised.abs().mean() + noised.tanh().abs().mean()) / 2, "hidden_l1")
    # the whole of it by hand: the noise is a constant that is added to hid1's pre-activation
    pre = inputs("ff")[0] @ model.hid1.w + model.hid1.b
    pre = pre + (noised - pre).detach()
    output = model.out(model.hid3(model.hid2(pre.tanh())))
    by_hand = loss("ff", output) + 0.3 * (pre.abs().mean() + pre.tanh().abs().mean()) / 2
    ours = loss("ff", ran.output) + ran.penalties["hidden_l1"]
    assert_close(ours, by_hand, "total loss")
    assert_gradients(ours, ran.model, gradients(by_hand, model), "total loss")


def second_input(sample: Record) -> None:
    """Each input is dropped once and is no hidden site; asked to drop ``in2`` twice, graphreg computes what theanets did."""
    traced = graphreg.trace(network("two_in"))
    regularizers = graphreg.from_kwargs(traced, **keywords(sample["kwargs"], "two_in"))
    assert [selected(traced, one, "two_in") for one in regularizers] == [{"in:out", "in2:out"}, {"hid1:out", "hid2:out"}]
    dropped_once = sample["outputs"]["in2:out-predrop"]
    once = sample | {"outputs": sample["outputs"] | {"in2:out": dropped_once}}
    assert_close(run(once).values["in2:out"], dropped_once, "in2:out")
    agrees(sample, [BernoulliDropout(("in_", "in2"), 0.25), BernoulliDropout(("in2", "hid1", "hid2"), 0.25)])


def squared(sample: Record) -> None:
    """theanets' unsquared norm in its place, all agrees; graphreg's own is the documented formula on the dropped values."""
    name = sample["network"]
    traced = graphreg.trace(network(name))
    regularizers = graphreg.from_kwargs(traced, **keywords(sample["kwargs"], name))
    places = [i for i, one in enumerate(regularizers) if isinstance(one, RecurrentNorm)]
    assert len(places) == 1
    theirs = [Telescoping(one.pattern, one.weight) if i in places else one for i, one in enumerate(regularizers)]
    agrees(sample, theirs)
    ran = run(sample)
    by_hand = 0.7 * squared_norms({"hid1:out": ran.values["hid1:out"]})
    assert_close(ran.penalties["recurrent_norm"], by_hand, "recurrent_norm")
    assert_close(by_hand, 0.7 * squared_norms({"hid1:out": tensor(sample["outputs"]["hid1:out"])}), "recurrent_norm")
    assert_gradients(ran.penalties["recurrent_norm"], ran.model, gradients(by_hand, ran.model), "recurrent_norm")


# --- moments --------------------------------------------------------------------------------------------------------


@cache
def drawn(key: str) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor], Any]:
    """Values before and after the splice of a record, over its 20,000 rows; inputs from N(0, 1), as theanets' were."""
    record = MOMENTS[key]
    name, rows = record["network"], record["batch"]
    model, before, after = network(name), probe(name, clean=True), probe(name)
    x = torch.randn(rows, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    traced = graphreg.trace(model)
    splice = graphreg.build(record["cls"], pattern=site_name(record["pattern"]), weight=record["weight"])
    with torch.no_grad():
        graphreg.regularize(model, splice, before, after, rng=0)(x)
    return seen(before, traced, name), seen(after, traced, name), model


def assert_moments(sample: Tensor, golden: Mapping[str, Any], what: str) -> None:
    """Mean and variance, of all and of each column, within 5 standard errors of the difference of two such estimates."""
    columns = [(sample.flatten(), golden["mean"], golden["var"])]
    columns += zip(sample.T, golden["mean_per_column"], golden["var_per_column"], strict=True)
    for values, mean, variance in columns:
        centred = (values - values.mean()).square()
        errors = [math.sqrt(2 * moment.var().item() / len(sample)) for moment in (values, centred)]
        assert abs(values.mean().item() - mean) < 5 * errors[0], what
        assert abs(centred.mean().item() - variance) < 5 * errors[1], what


def has_theanets_moments(record: Record) -> None:
    """Assert the moments of the value before, after, and of the change; and the facts about the mask or the noise."""
    before, after, _ = drawn(record["id"])
    pre, noised = before[record["pattern"]], after[record["pattern"]]
    for values, golden in ((pre, "pre"), (noised, "noised"), (noised - pre, "diff")):
        assert_moments(values, record[golden], golden)
    if record["cls"] == "GaussianNoise":
        normal_draws(record, pre, (noised - pre) / record["weight"])
    else:
        dropped(record, pre, noised)


def normal_draws(record: Record, pre: Tensor, z: Tensor) -> None:
    """Standard errors of n draws of N(0, 1): of the kurtosis sqrt(24 / n), of a correlation 1 / sqrt(n)."""
    n = z.numel()
    assert abs(z.mean()) < 5 / math.sqrt(n)
    assert abs(z.var() - 1) < 5 * math.sqrt(2 / n)
    assert abs(z.pow(4).mean() / z.square().mean() ** 2 - record["kurtosis"]) < 5 * math.sqrt(2 * 24 / n)
    assert 3.5 < z.abs().max() < 6  # theanets: 4.4 to 4.6
    assert abs(torch.corrcoef(torch.stack([pre.flatten(), z.flatten()]))[0, 1]) < 5 / math.sqrt(n)


def dropped(record: Record, pre: Tensor, noised: Tensor) -> None:
    gone, p = noised == 0, record["weight"]
    error = math.sqrt(p * (1 - p) / gone.numel())
    assert abs(gone.double().mean() - p) < 5 * error
    assert abs(gone.double().mean() - record["fraction_zeroed"]) < 5 * math.sqrt(2) * error
    assert_close((noised / pre)[~gone].min(), record["kept_scale_min"], "least scale")
    assert_close((noised / pre)[~gone].max(), record["kept_scale_max"], "largest scale")
    rows_all_same, columns_all_same = bool((gone == gone[:1]).all()), bool((gone == gone[:, :1]).all())
    assert record["mask_varies_per_element"] == {"rows_all_same": rows_all_same, "columns_all_same": columns_all_same}


def downstream(record: Record) -> dict[str, bool]:
    """The facts that theanets' record tells of what reads the spliced value."""
    before, after, model = drawn(record["id"])
    clean = model(before["in:out"])
    facts = {
        "hid1_pre_uses_value_in_outputs": (before["hid1:pre"], after["in:out"] @ model.hid1.w + model.hid1.b),
        "hid2_pre_uses_value_in_outputs": (before["hid2:pre"], after["hid1:out"] @ model.hid2.w + model.hid2.b),
        "hid1_out_is_tanh_of_final_hid1_pre": (before["hid1:out"], after["hid1:pre"].tanh()),
    }
    return {fact: torch.allclose(a, b) for fact, (a, b) in facts.items()} | {"out_changed": not torch.allclose(after["out:out"], clean)}


def agrees_at_random(record: Record) -> None:
    has_theanets_moments(record)
    assert downstream(record) == record["downstream"]


def random_before_the_activation(record: Record) -> None:
    """The site has theanets' moments; what follows reads it, where theanets' ``hid1:out`` comes from the clean value."""
    has_theanets_moments(record)
    assert downstream(record) == dict.fromkeys(record["downstream"], True)


# --- coverage -------------------------------------------------------------------------------------------------------

DELIBERATE: dict[str, tuple[Row, Callable[[Record], None]]] = {
    "sample/noise-pre": (Row.VALUES, noise_before_the_activation),
    "sample/two-in-dropout": (Row.DISJOINT, second_input),
    "sample/rnn-dropout": (Row.SQUARED, squared),
    "BernoulliDropout/hid1:pre": (Row.VALUES, random_before_the_activation),
    "GaussianNoise/hid1:pre": (Row.VALUES, random_before_the_activation),
}
CHECKS = dict.fromkeys(SAMPLES, agrees) | dict.fromkeys(MOMENTS, agrees_at_random)
RECORDS = SAMPLES | MOMENTS
AGREEING = [record for record in RECORDS if record not in DELIBERATE]


@pytest.mark.parametrize("record", AGREEING)
def test_a_record_agrees(record: str) -> None:
    CHECKS[record](RECORDS[record])


@pytest.mark.parametrize("record", DELIBERATE)
def test_a_record_differs_on_purpose(record: str) -> None:
    with pytest.raises((AssertionError, graphreg.GraphRegError)):  # a row must not cover up an agreement
        CHECKS[record](RECORDS[record])
    DELIBERATE[record][1](RECORDS[record])


@pytest.mark.parametrize("record", [*GOLDEN["samples"], *GOLDEN["stochastic"]], ids=lambda record: record["id"])
def test_each_record_is_covered_once(record: Record) -> None:
    classes = {one["cls"].lower() for one in record.get("regularizers", [record])}
    assert [*AGREEING, *DELIBERATE].count(record["id"]) == bool(classes & PRESENT)
    assert classes <= PRESENT | ABSENT


def test_every_deliberate_difference_has_a_record() -> None:
    assert DELIBERATE.keys() <= RECORDS.keys()


# --- rows of the table that stand in no sample ----------------------------------------------------------------------


def masks(*regularizers: graphreg.Regularizer) -> dict[str, Tensor]:
    """Where the values of two_in are zero after dropout, over 20,000 rows of ones."""
    model, found = network("two_in"), probe("two_in")
    ones = torch.ones(20_000, 4, dtype=torch.float64)
    graphreg.regularize(model, *regularizers, found, rng=13)(ones, ones)
    return {name: (value == 0).double() for name, value in seen(found, graphreg.trace(model), "two_in").items()}


def test_sites_have_streams_of_their_own() -> None:
    """Row.STREAMS: in theanets two sites of one width have one mask, and two dropouts at one site drop the same elements."""
    assert GOLDEN["observed"]["same-seed-masks"]["same_mask_in_hid1"]
    two = masks(BernoulliDropout(("in_", "in2"), 0.5))
    correlation = torch.corrcoef(torch.stack([two["in:out"].flatten(), two["in2:out"].flatten()]))[0, 1]
    assert abs(correlation) < 5 / math.sqrt(80_000)
    twice = masks(BernoulliDropout("in_", 0.25), BernoulliDropout("in_", 0.25))["in:out"].mean()
    independent = 1 - 0.75**2
    assert abs(twice - independent) < 5 * math.sqrt(independent * (1 - independent) / 80_000)
    assert abs(GOLDEN["observed"]["two-dropouts-same-output-same-seed"]["zero_fraction"] - 0.25) < 0.01


def test_additions_are_never_matched() -> None:
    """Row.COPIES: in theanets a second ``hid1:*`` also drops the copies that the first one saved."""
    assert "hid1:out-predrop-predrop" in GOLDEN["observed"]["glob-hid1-star-twice"]["added"]
    traced = graphreg.trace(network("ff"))
    everything = selector("hid1:*", "ff")
    plan = graphreg.plan(traced, [BernoulliDropout(everything, 0.1), BernoulliDropout(everything, 0.2), HiddenL1(everything, 1.0)])
    acts = {name: [output_name(edit.site, "ff") for edit in plan.of(name)] for name in plan.regularizers}
    assert acts == {name: ["hid1:pre", "hid1:out"] for name in ("dropout", "dropout_1", "hidden_l1")}
    module = graphreg.rewrite(traced, plan)
    spliced = [node.meta["graphreg"]["site"] for node in module.graph.nodes if node.meta.get("graphreg", {}).get("kind") == "splice"]
    assert spliced == ["hid1.pre", "hid1.pre", "hid1.tanh", "hid1.tanh"]


@pytest.mark.parametrize("splice", [GaussianNoise("out", 3.0), BernoulliDropout("out", 0.5)])
def test_validation_is_clean(splice: graphreg.Splice) -> None:
    """Row.TRAIN: theanets' validation loss at noise 3 is 9.4 where the clean one is 1.04."""
    assert GOLDEN["observed"]["validation-is-noised"]["valid_loss"] > 9
    model = network("ff")
    module = graphreg.regularize(model, splice)
    assert not torch.equal(module(*inputs("ff")).output, model(*inputs("ff")))
    module.eval()
    assert torch.equal(module(*inputs("ff")).output, model(*inputs("ff")))
    assert_close(loss("ff", module(*inputs("ff")).output), NETWORKS["ff"]["loss_unregularized"], "validation")
