"""The study: what its protocol asks, how strengths are chosen, when a claim counts as shown, going on, and what the page says."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import graphreg
from study import run as study_run
from study.__main__ import asked, main
from study.arms import ARMS, PLACES, SEEDS, TUNING, Arm, S, plain
from study.claims import CLAIMS, NOT_TESTED, Check, Claim
from study.data import CANCER_TEST, DIGITS_TEST, TWINS, cancer, digits, digits_split, split, twins
from study.measures import calibration_error, closed_gates, correlation, halved
from study.page import page, seen
from study.run import chosen
from study.setups import MEASURES, SETUPS
from study.verdicts import Found, found, interval, ready

TOP = Path(__file__).parents[2]
RESULTS = json.loads((TOP / "docs" / "study.json").read_text())


# The protocol


def test_every_regularizer_is_tested_or_named_as_not_tested() -> None:
    every = {cls.__name__ for cls in graphreg.registered().values() if cls.__module__.startswith("graphreg.passes.")}
    left_out = [name for names in NOT_TESTED for name in names.split(", ")]
    tested = {claim.regularizer for claim in CLAIMS}
    assert sorted([*tested, *left_out]) == sorted(every)


def test_claims_name_arms_and_measures_that_exist() -> None:
    for claim in CLAIMS:
        build = {type(each).__name__ for each in instances(ARMS[claim.arm])}
        assert claim.regularizer in build
        for check in claim.checks:
            assert {check.measure, check.other} - {""} <= set(MEASURES) and check.better in ("higher", "lower")
            assert not isinstance(check.than, str) or ARMS[check.than].setup == ARMS[claim.arm].setup
    assert {arm.setup for arm in ARMS.values()} == set(SETUPS) and not set(SEEDS) & set(TUNING)


def instances(arm: Arm) -> list[Any]:
    return graphreg.from_kwargs(torch.nn.Linear(1, 1), **arm.filled(arm.grid[0]))


def test_no_test_row_is_trained_on_or_chosen_on() -> None:
    for seed in (*SEEDS, *TUNING):
        train, validation, test = digits_split(seed)
        assert len({*train.tolist(), *validation.tolist(), *test.tolist()}) == 200 + 300 + DIGITS_TEST
        assert torch.equal(test, torch.arange(DIGITS_TEST))
    assert min(split(569, CANCER_TEST, 200, 160, 3)[0]) >= CANCER_TEST


def test_the_data() -> None:
    """A copy of a column is much like it, and a shuffled column has the same values in another order."""
    assert digits()[0].shape == (1797, 64) and float(digits()[0].max()) == 1
    x, _ = twins()
    groups = x.reshape(len(x), -1, TWINS + 1)
    assert x.shape == (442, 40) and float(torch.corrcoef(groups[:, 3].T).min()) > 0.85
    x, _ = cancer()
    assert x.shape == (569, 60) and torch.equal(x[:, 4].sort().values, x[:, 34].sort().values) and not torch.equal(x[:, 4], x[:, 34])


@pytest.mark.parametrize("arm", [plain("few"), "few: L0 gates", "maps: DropBlock", "deep: LayerDrop", "resnet: dropout, unmarked",
    "wide: dropout, unmarked", "selu: alpha dropout", "chain: orthogonality", "cells: zoneout", "lstm: weight drop",
    "autoencoder: contractive", "views: covariance", "transfer: L2-SP", "regression: elastic net", "columns: group lasso"])  # fmt: skip
def test_networks_train_and_measure_what_the_claims_need(arm: str) -> None:
    """With the same seed, they do it again, number by number. The three deep networks train by the same code: one of them runs again."""
    given, times = ARMS[arm], 1 if arm.startswith(("deep", "resnet")) else 2
    outcomes = [SETUPS[given.setup](given.filled(given.grid[0] if given.grid else None), 7, steps=2) for _ in range(times)]
    assert outcomes[0] == outcomes[-1]
    needed = {check.measure for claim in CLAIMS if claim.arm == arm for check in claim.checks}
    assert needed | {"validation"} <= set(outcomes[0]) <= set(MEASURES) | {"validation"}


@pytest.mark.parametrize("arm", PLACES)
def test_the_places_of_dropout_are_those_that_the_page_says(arm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Regularized(Exception):
        """What was made, before it is trained."""

    def regularize(*args: Any, **keywords: Any) -> torch.nn.Module:
        raise Regularized(graphreg_regularize(*args, **keywords))

    graphreg_regularize = graphreg.regularize
    monkeypatch.setattr(graphreg, "regularize", regularize)
    with pytest.raises(Regularized) as made:
        SETUPS[ARMS[arm].setup](ARMS[arm].filled(0.5), 7, steps=1)
    sites = [site.name for site in graphreg.report(made.value.args[0], cost=False).sites]
    assert len(sites) == PLACES[arm][0] and sites[-1] == ("norm" if ARMS[arm].setup == "deep" else "pool")


# The measures


def test_measures_by_hand() -> None:
    units = torch.tensor([[1.0, 2.0, 0.0], [2.0, 4.0, 0.0], [3.0, 6.0, 0.0]])
    assert correlation(units) == pytest.approx(1)  # the third never changes
    assert correlation(units[:, 1:]) == 0
    logits = torch.tensor([[0.0, 0.0], [0.0, 100.0]])
    assert calibration_error(logits, torch.tensor([0, 0])) == pytest.approx(100 * (0.5 + 1) / 2)
    net = torch.nn.Sequential(torch.nn.Linear(1, 4), torch.nn.ReLU(), torch.nn.Linear(4, 1))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[4.0], [1.0], [3.0], [2.0]]))
        net[2].weight.copy_(torch.tensor([[1.0, 9.0, 1.0, 1.0]]))
    assert halved(net)[2].weight.tolist() == [[1.0, 9.0, 0.0, 0.0]] and net[2].weight.tolist() == [[1.0, 9.0, 1.0, 1.0]]


def test_closed_gates_are_those_of_the_module() -> None:
    net = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.ReLU(), torch.nn.Linear(4, 1))
    x = torch.rand(3, 2)
    module = graphreg.regularize(net, l0_gates=0.1, example_inputs=x).eval()
    assert closed_gates(net) == closed_gates(module) == 0
    with torch.no_grad():
        module.get_parameter("graphreg_rules.l0_gates.state._1.log_alpha")[:3] = -5
    assert closed_gates(module) == 75
    with torch.no_grad():
        net[2].weight[:, :3] = 1e6
    assert float(module(x).output.detach().abs().max()) < 1e3  # those units are 0 indeed


# Strengths


def runs(*scores: float) -> dict[str, Any]:
    return {f"{place}": {str(seed): {"validation": score} for seed in TUNING} for place, score in enumerate(scores, 1)}


@pytest.mark.parametrize(
    ("rule", "scores", "strength"),
    [
        ("best", (80, 90, 85), 2),
        ("best", (90, 90, 85), 1),
        ("strongest", (95, 89, 88.9), 2),
        ("strongest", (80, 89, 70), 2),
        ("strongest", (80, 80, 85), 1),
    ],
)
def test_how_a_strength_is_chosen(rule: str, scores: tuple[float, ...], strength: float) -> None:
    """The control has 90; "strongest" may have a point less."""
    control = {"": runs(90)["1"]}
    assert chosen(Arm("few: x", "few", {"hidden_l1": S}, (1, 2, 3), rule), runs(*scores), control) == strength


# Verdicts


def test_an_interval_by_hand() -> None:
    """Mean 2, standard deviation 1, three values: t is 4.303, so that half the width is 4.303 / sqrt(3)."""
    assert interval([1.0, 2.0, 3.0]) == pytest.approx((2 - 2.484, 2 + 2.484), abs=1e-3)


@pytest.mark.parametrize(
    ("better", "margin", "low", "high", "holds", "sentence"),
    [
        ("higher", 0, 0.1, 2, True, ""),
        ("higher", 0, -0.1, 2, False, "no clear difference, higher was claimed"),
        ("higher", 0, -2, -0.1, False, "the opposite of the claim"),
        ("lower", 0, -2, -0.1, True, ""),
        ("lower", 0, 0.1, 2, False, "the opposite of the claim"),
        ("higher", 1, -0.9, -0.5, True, ""),
        ("higher", 1, -1.1, 3, False, "a loss of 1 point or more is not excluded"),
    ],
)
def test_when_a_check_holds(better: str, margin: float, low: float, high: float, holds: bool, sentence: str) -> None:
    each = Found(Check("accuracy", better, "few: nothing", margin), 90, 89, low, high)
    assert each.holds is holds
    assert holds or seen(each).endswith(f": {sentence}")


def test_a_fixed_number_that_is_missed() -> None:
    each = Found(Check("closed", "higher", 50.0), 20, 50, -32, -28)
    assert seen(each) == "closed 20.0 against 50.0 (a fixed number), difference -32.0 to -28.0: higher was claimed"


def test_differences_are_taken_seed_by_seed() -> None:
    def record(arm: str, *values: float) -> dict[str, Any]:
        outcomes = {str(seed): {"accuracy": values[seed % 2], "pruned": 80.0} for seed in SEEDS}
        return {"digest": ARMS[arm].digest, "chosen": None, "runs": {"": outcomes}}

    records = {"maps: DropBlock": record("maps: DropBlock", 70, 90), "maps: nothing": record("maps: nothing", 69, 88)}
    claim = Claim("DropBlock", "maps: DropBlock", "", "", (Check("accuracy", "higher", "maps: nothing"),))
    assert ready(records, claim) and not ready({"maps: nothing": records["maps: nothing"]}, claim)
    each = found(records, claim, claim.checks[0])
    assert (each.value, each.against, each.effect) == (80, 78.5, 1.5) and each.holds  # 1 and 2 in turn; unpaired, it would be lost
    assert found(records, claim, Check("accuracy", "higher", "maps: nothing", other="pruned")).against == 80
    assert found(records, claim, Check("accuracy", "higher", 50.0)).against == 50


# The command


class Inline(Executor):
    """Runs at once, and stops at the run of this number as if somebody had interrupted it."""

    def __init__(self, stop: int = 10**6) -> None:
        self.stop, self.count = stop, 0

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        if self.count == self.stop:
            raise KeyboardInterrupt
        self.count += 1
        future: Future[Any] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


def command(folder: Path, pool: Inline, *more: str) -> int:
    @contextmanager
    def pool_of(count: int) -> Iterator[Executor]:
        yield pool

    return main(["--results", str(folder / "study.json"), "--page", str(folder / "study.md"), *more], pool_of)


def test_a_run_that_was_stopped_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = list[tuple[str, Any, int]]()

    def train(setup: str, keywords: dict[str, Any], seed: int) -> dict[str, float]:
        trained.append((setup, keywords, seed))
        return {"validation": float(seed), "accuracy": 1.0, "seconds": 0.0}

    monkeypatch.setattr(study_run, "train", train)
    only = ("--only", "selu: alpha*")
    assert command(tmp_path, Inline(stop=15), *only) == 130
    kept = json.loads((tmp_path / "study.json").read_text())
    assert sum(len(seeds) for record in kept.values() for seeds in record["runs"].values()) == 13  # the control, whose runs had all ended
    assert command(tmp_path, Inline(), *only) == 0
    assert len(trained) == 15 + 9 + 10  # two had run, and were not kept
    assert {seed for setup, _, seed in trained} == {*SEEDS, *TUNING} and {setup for setup, _, _ in trained} == {"selu"}
    assert command(tmp_path, Inline(stop=0), *only) == 0  # nothing is left
    assert "| `alpha_dropout=s` | best | **0.05: 101.0**, 0.1: 101.0, 0.2: 101.0 |" in (tmp_path / "study.md").read_text()
    assert command(tmp_path, Inline(), "--fresh", *only) == 0 and len(trained) == 34 + 32
    assert command(tmp_path, Inline(), "--fresh", "--only", "chain: nothing") == 0 and len(trained) == 34 + 32 + 13
    assert len(json.loads((tmp_path / "study.json").read_text())) == 3  # the others' records stay


def test_an_arm_brings_its_control_and_its_base() -> None:
    assert [arm.name for arm in asked(["few: max*"])] == ["few: nothing", "few: dropout", "few: max-norm"]
    assert [arm.name for arm in asked(["*"])] == list(ARMS)
    with pytest.raises(LookupError, match="'few: maxnorm' names no arm. There are: few: nothing, "):
        asked(["few: maxnorm"])


def test_other_settings_of_an_arm_are_another_record() -> None:
    assert len({arm.digest for arm in ARMS.values()}) == len(ARMS)
    assert Arm("few: dropout", "few", {"hidden_dropout": S}, (0.1,), "best").digest != ARMS["few: dropout"].digest


# The page


def test_the_results_are_those_of_this_protocol() -> None:
    assert all(ready(RESULTS, claim) for claim in CLAIMS)
    for name, record in RESULTS.items():
        arm = ARMS[name]
        control = RESULTS[plain(arm.setup)]["runs"]
        assert record["chosen"] == (chosen(arm, record["runs"], control) if arm.grid else None)


def test_the_page_is_that_of_its_results() -> None:
    assert (TOP / "docs" / "study.md").read_text() == page(RESULTS)


def test_a_page_without_results_has_the_protocol() -> None:
    text = page({})
    assert "Nothing has run yet." in text and all(claim.says in text for claim in CLAIMS)
