"""docs/theanets.md: every number of its table is what theanets recorded, or what graphreg computes here."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphreg
from graphreg.passes import BernoulliDropout, Contractive, GaussianNoise, HiddenL1, RecurrentNorm, RecurrentState, WeightL1, WeightL2
from theanets_nets import GOLDEN, NETWORKS, Record, inputs, keywords, loss, network, tensor

TOP = Path(__file__).parents[2]
PAGE = (TOP / "docs" / "theanets.md").read_text()
NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?(?:e-\d+)?(?![\w])|\bnan\b")
OBSERVED: Record = GOLDEN["observed"]
CASES: dict[str, Any] = {case["id"]: case["regularizers"][0] for case in GOLDEN["cases"]}
KEYWORDS: dict[str, Any] = {record["id"]: record for record in GOLDEN["from_kwargs"]}


@cache
def rows() -> Mapping[str, tuple[str, ...]]:
    """The table: case to the cells for documentation, code and graphreg."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.splitlines() if line.startswith("| ")]
    return {line[0]: tuple(line[1:]) for line in lines[1:]}


def numbers(cell: str) -> list[str]:
    """The numbers of a cell; what stands in code or in brackets is no result."""
    return NUMBER.findall(re.sub(r"`[^`]*`", "", cell))


def term(name: str, *regularizers: graphreg.Regularizer, given: Sequence[Tensor] = (), model: nn.Module | None = None) -> float:
    """The penalty on one of theanets' networks, on its own inputs unless others are given."""
    module = graphreg.regularize(model or network(name), *regularizers)
    (penalty,) = module(*(given or inputs(name))).penalties.values()
    value: float = penalty.item()
    return value


def hidden_sums() -> float:
    """theanets' documentation of HiddenL1: sums over all elements of an output, averaged over outputs."""
    values = [tensor(NETWORKS["ff"]["outputs"][output]).abs().sum() for output in CASES["hidden-l1/default"]["matched_outputs"]]
    return float(sum(values)) / len(values)


def opposite() -> nn.Module:
    """Units 1 and 3 are the opposites of 0 and 2, unit 4 is off, no biases: what theanets' record of the case was made with."""
    model = network("ff")
    hid1 = model.get_submodule("hid1")
    with torch.no_grad():
        w, b = hid1.get_parameter("w"), hid1.get_parameter("b")
        w[:, 1], w[:, 3], w[:, 4] = -w[:, 0], -w[:, 2], 0
        b.zero_()
    return model


class Two(nn.Module):
    """Two sites that give back what they are given."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Identity(), nn.Identity()

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return self.a(x), self.b(y)


def correlation() -> float:
    """Of a million draws of graphreg's noise at two sites."""
    zeros = torch.zeros(1000, 1000)
    a, b = graphreg.regularize(Two(), GaussianNoise("a", 0.1), GaussianNoise("b", 0.2), rng=0)(zeros, zeros).output
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])


def zeros_of_two_dropouts() -> float:
    ones = torch.ones(1000, 1000)
    a, _ = graphreg.regularize(Two(), BernoulliDropout("a", 0.25), BernoulliDropout("a", 0.25), rng=0)(ones, ones).output
    return float((a == 0).double().mean())


def validation_loss() -> float:
    module = graphreg.regularize(network("ff"), output_noise=3.0, rng=0)
    assert loss("ff", module(*inputs("ff")).output).item() > 2
    return loss("ff", module.eval()(*inputs("ff")).output).item()


def found(record: str) -> list[graphreg.Regularizer]:
    """What graphreg makes of a record's keywords."""
    name = KEYWORDS[record]["network"]
    return graphreg.from_kwargs(graphreg.trace(network(name)), **keywords(KEYWORDS[record]["kwargs"], name))


def edits(name: str, *regularizers: graphreg.Regularizer) -> list[str]:
    return [edit.site.name for edit in graphreg.plan(graphreg.trace(network(name)), regularizers).edits]


def copies_dropped() -> tuple[int, int]:
    """By theanets, and by graphreg: additions that its edits have sites in."""
    theirs = [name for name in OBSERVED["glob-hid1-star-twice"]["added"] if name.count("-predrop") == 2]
    twice = [BernoulliDropout(("hid1", "hid1.pre"), 0.25), BernoulliDropout(("hid1", "hid1.pre"), 0.25)]
    return len(theirs), sum(site not in ("hid1.tanh", "hid1.pre", "hid1") for site in edits("ff", *twice))


def on_weights_and_values() -> dict[str, tuple[list[float], list[float], list[float]]]:
    weight, state, norm = OBSERVED["weight-vs-doc"], OBSERVED["recurrent-state-vs-doc"], OBSERVED["recurrent-norm-vs-doc"]
    l2, l1 = (term("ff", kind("*", 1.0)) for kind in (WeightL2, WeightL1))
    sums = [term("ff", kind("*", 1.0, reduction="sum")) for kind in (WeightL2, WeightL1)]
    squared, paper = (term("rnn", RecurrentNorm("hid1", 1.0, norm=kind)) for kind in ("squared", "l2"))
    hidden = CASES["hidden-l1/default"]["term"]
    return {
        "`weight_l2`, four weight matrices": ([weight["l2_doc_sum"]], [weight["l2_code_mean"]], [l2, sums[0]]),
        "`weight_l1`, four weight matrices": ([weight["l1_doc_sum"]], [weight["l1_code_mean"]], [l1, sums[1]]),
        "`hidden_l1`, three layers": ([hidden_sums()], [hidden], [term("ff", HiddenL1("*", 1.0))]),
        "`hidden_l1` on `hid1`": ([], [CASES["hidden-l1/bare-layer"]["term"]], [term("ff", HiddenL1("hid1", 1.0))]),
        "`recurrent_norm`, tanh": (
            [norm["doc_squared_difference_of_squared_norms_mean"]], [norm["code"]], [squared, paper],
        ),
        "`recurrent_norm`, rectifier": (
            [], [CASES["recurrent-norm/rnn-relu"]["term"]], [term("rnn_relu", RecurrentNorm("hid1", 1.0))],
        ),
        "`recurrent_state`": (
            [state["doc_sum_over_units_mean_over_batch_time"]], [state["code"]], [term("rnn", RecurrentState("hid1", 1.0))],
        ),
        "`recurrent_state`, one step": (
            [], [float(CASES["recurrent-state/T1"]["term"])], [term("rnn_T1", RecurrentState("hid1", 1.0))],
        ),
        "`recurrent_state` of [batch, units]": ([], [OBSERVED["recurrent-state-2d"]["numpy"]], []),
        "`recurrent_state` of an input alone": ([], [CASES["recurrent-state/in"]["term"]], []),
        "`recurrent_state`, no pattern": ([], [OBSERVED["recurrent-scalar-does-not-raise"]["value"]], []),
    }  # fmt: skip


def on_jacobians() -> dict[str, tuple[list[float], list[float], list[float]]]:
    fact, cancels = OBSERVED["contractive-vs-doc"], OBSERVED["contractive-cancels"]
    doc, exact = fact["doc_frobenius_per_example_mean"], Contractive("hid1", 1.0, estimator="exact")
    (x,) = inputs("ff")
    twice = [term("ff", one, given=[torch.cat([x, x])]) for one in (exact, Contractive("hid1", 1.0, estimator="mean"))]
    assert twice[1] == pytest.approx(fact["code_same_rows_twice"], rel=1e-9)
    assert term("ff", Contractive("hid1", 1.0, estimator="mean"), model=opposite()) == pytest.approx(cancels["code"], abs=1e-30)
    return {
        "`contractive`, one layer": (
            [doc], [fact["code"]], [term("ff", exact), term("ff", Contractive("hid1", 1.0, estimator="mean"))],
        ),
        "`contractive`, the same examples twice": ([doc], [fact["code_same_rows_twice"]], [twice[0]]),
        "`contractive`, units in opposite pairs": (
            [cancels["doc_frobenius_per_example_mean"]], [cancels["code"]], [term("ff", exact, model=opposite())],
        ),
        "`contractive`, no pattern": ([], [], [term("ff", Contractive("*", 1.0, estimator="exact"))]),
        "`contractive`, two inputs of unequal size": ([], [], [term("two_in_uneq", exact)]),
        "`contractive`, `wrt` that matches nothing": ([], [float(CASES["contractive/wrt-nothing"]["term"])], []),
    }  # fmt: skip


def on_noise_and_keywords() -> dict[str, tuple[list[float], list[float], list[float]]]:
    in2 = [one for one in KEYWORDS["dropout_two_in"]["result"] if "in2:out" in one["pattern"]]
    copies, dropped = copies_dropped(), [name for one in found("dropout_two_in") for name in edits("two_in", one)]
    scale = OBSERVED["BernoulliDropout-weight--0.25"]["value"]["scale"][1]
    nan = OBSERVED["BernoulliDropout-weight-1.0"]["value"]["nan_fraction"]
    return {
        "correlation of the noise at two sites": ([], [OBSERVED["same-seed-correlation"]["corr_in_hid1"]], [correlation()]),
        "two dropouts of 0.25 at one value: share of zeros": (
            [1 - 0.75**2], [OBSERVED["two-dropouts-same-output-same-seed"]["zero_fraction"]], [zeros_of_two_dropouts()],
        ),
        "`noise` for a name that does not exist": ([], [len(OBSERVED["bad-pattern-weight-ok"]["added"])], []),
        "`weight_l3=0.1`, which is no keyword": ([], [len(KEYWORDS["unknown"]["result"])], []),
        "`regularizers=[…]` beside two other keywords": ([], [len(KEYWORDS["list"]["result"])], [len(found("list"))]),
        "`regularizers=` a single instance": ([], [len(KEYWORDS["single"]["result"])], [len(found("single"))]),
        "`hid1:*` dropped twice": ([], [copies[0]], [copies[1]]),
        "validation loss under `output_noise=3`": (
            [OBSERVED["validation-is-noised"]["clean_mse"]], [OBSERVED["validation-is-noised"]["valid_loss"]], [validation_loss()],
        ),
        "`input_dropout` and `hidden_dropout`, a second input": ([], [len(in2)], [dropped.count("in2")]),
        "default sites of dropout and noise": (
            [], [len(OBSERVED["default-pattern"]["added"])], [len(edits("ff", BernoulliDropout("*", 0.5)))],
        ),
        "dropout rate 1": ([], [nan], []),
        "dropout rate -0.25": ([], [scale], []),
        "`dropout={…}` with two rates of 0 and a None": (
            [], [len(KEYWORDS["dropout_dict_zero"]["result"])], [len(found("dropout_dict_zero"))],
        ),
        "`weight_l2=0`": (
            [], [0, len(KEYWORDS["weight_l2_zero"]["result"])],
            [len(found("weight_l2_zero")), len(graphreg.from_kwargs(network("ff"), weight_l2={"weight": 0}))],
        ),
    }  # fmt: skip


RAISING: dict[str, Callable[[], object]] = {
    "`recurrent_state` of [batch, units]": lambda: term("ff", RecurrentState("hid1", 1.0)),
    "`recurrent_state` of an input alone": lambda: term("rnn", RecurrentState("in_", 1.0)),
    "`recurrent_state`, no pattern": lambda: graphreg.regularize(network("rnn"), recurrent_state=0.3),
    "`contractive`, `wrt` that matches nothing": lambda: term("ff", Contractive("hid1", 1.0, wrt="nope")),
    "`noise` for a name that does not exist": lambda: graphreg.regularize(network("ff"), noise={"nope": 0.1}),
    "`weight_l3=0.1`, which is no keyword": lambda: graphreg.regularize(network("ff"), weight_l3=0.1),
    "dropout rate 1": lambda: BernoulliDropout("*", 1.0),
    "dropout rate -0.25": lambda: BernoulliDropout("*", -0.25),
}
CRASHES = {  # theanets' own
    "`contractive`, no pattern": "contractive/default-pattern",
    "`contractive`, two inputs of unequal size": "contractive/two-in-uneq-all",
}


def test_every_number() -> None:
    expected = on_weights_and_values() | on_jacobians() | on_noise_and_keywords()
    assert expected.keys() == rows().keys()
    wrong = {}
    for case, columns in expected.items():
        shown = tuple(numbers(cell) for cell in rows()[case])
        wanted = tuple([f"{value:.6g}" for value in column] for column in columns)
        if not all(map(agree, shown, wanted)):
            wrong[case] = (shown, wanted)
    assert not wrong


def agree(shown: list[str], wanted: list[str]) -> bool:
    """To the six digits that the page shows; processors round sums of float32 differently, which moves a correlation near 0 by 1e-8."""
    close = [math.isclose(float(a), float(b), rel_tol=5e-6, abs_tol=1e-7) or a == b for a, b in zip(shown, wanted, strict=False)]
    return len(shown) == len(wanted) and all(close)


@pytest.mark.parametrize("case", RAISING)
def test_every_error_of_graphreg(case: str) -> None:
    with pytest.raises(graphreg.GraphRegError) as raised:
        RAISING[case]()
    assert rows()[case][2].startswith(f"`{type(raised.value).__name__}`")


def test_every_error_is_tried() -> None:
    assert [case for case, cells in rows().items() if "Error`" in cells[2]] == list(RAISING)
    assert {case: cells[1].strip("`") for case, cells in rows().items() if "Error`" in cells[1]} == {
        case: CASES[name]["error"] for case, name in CRASHES.items()
    }


def test_the_page_says_where_its_numbers_come_from() -> None:
    prose = "\n".join(line for line in PAGE.splitlines() if not line.startswith("|"))
    commit = re.search(r"commit (\w+)", prose)
    assert commit and commit[1] in GOLDEN["meta"]["source"] and f"Theano {GOLDEN['meta']['theano']}, {GOLDEN['meta']['floatX']}" in prose
    assert "(theanets.md)" in (TOP / "docs" / "regularizers.md").read_text()
