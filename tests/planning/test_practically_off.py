"""A penalty whose strength changes nothing is named by the plan, the report and the log; one that acts is not."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

import graphreg
from graphreg import schedules

NET = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 512))
OFF = "practically off: it pulls a weight of 1 like a weight_decay of {} in SGD, or less; give a larger weight, or reduction='sum'"


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines = list[str]()
    monkeypatch.setattr(logging.getLogger("graphreg"), "warning", lambda text, *args: lines.append(text % args))
    return lines


def notes(module: nn.Module) -> list[str]:
    return [note for entry in graphreg.report(module, cost=False).regularizers for note in entry.notes if "practically" in note]


@pytest.mark.parametrize(
    ("given", "pull"),
    [
        ({"weight_l2": 1e-4}, "3.8e-10"),  # 2e-4 / (2 * 512 * 512)
        ({"weight_l1": 1e-4}, "1.9e-10"),
        ({"l2_sp": 1e-4}, "3.8e-10"),
        ({"elastic_net": {"weight": 1e-4, "l1_ratio": 0.3}}, "1.9e-10"),
        ({"weight_l2": {"weight": 1e-4, "pattern": "0.weight"}}, "7.6e-10"),
    ],
)
def test_plan_report_and_log_name_it(given: dict[str, object], pull: str, log: list[str]) -> None:
    (name,) = given
    plan = graphreg.plan(graphreg.trace(NET), graphreg.from_kwargs(NET, **given))
    assert f"\n{name}: {OFF.format(pull)}" in str(plan)
    module = graphreg.regularize(NET, **given)
    assert log == [f"{name} is {OFF.format(pull)}"]
    assert notes(module) == [OFF.format(pull)]


def test_the_pull_is_the_gradient() -> None:
    """The largest gradient at weights of 1, beside that of a weight decay."""
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    for parameter in net.parameters():
        nn.init.ones_(parameter)
    for key in ("weight_l2", "weight_l1", "elastic_net"):
        module = graphreg.regularize(net, **{key: 3e-7})
        net.zero_grad()
        module(torch.ones(1, 4)).penalties[key].backward()
        largest = max(parameter.grad.max().item() for parameter in net.parameters() if parameter.grad is not None)
        assert notes(module) == [OFF.format(f"{largest:.2g}")]


@pytest.mark.parametrize(
    "given",
    [
        {"weight_l2": {"weight": 1e-4, "reduction": "sum"}},
        {"weight_l2": 1.0},
        {"weight_l2": {"weight": 0}},  # installed, to be raised later
        {"weight_l2": schedules.linear(0, 1e-4, 10)},
        {"group_lasso": 1e-4},  # the slope depends on the other weights
        {"covariance": 1e-9},  # and here on the other values
        {"hidden_l2": 1e-6},
        {"hidden_l1": {"weight": 0}},
        {"hidden_dropout": 1e-9},
    ],
)
def test_what_acts_or_is_not_known_is_not_named(given: dict[str, object], log: list[str]) -> None:
    module = graphreg.regularize(NET, **given)
    assert notes(module) == [] and log == []
    assert "practically" not in str(graphreg.plan(graphreg.trace(NET), graphreg.from_kwargs(NET, **given)))


PART = "practically off at {}: there" + OFF.removeprefix("practically off:")
UNEVEN = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 2))


@pytest.mark.parametrize(
    ("given", "where", "pull"),
    [
        ({"weight_l2": 1e-2}, "2 of 3 parameters (0.weight, 2.weight)", "2.5e-08"),  # 2e-2 / (3 * 512 * 512); 4.weight: 6.5e-6
        ({"l2_sp": 1e-2}, "2 of 3 parameters (0.weight, 2.weight)", "2.5e-08"),
        ({"weight_l1": 1e-2}, "2 of 3 parameters (0.weight, 2.weight)", "1.3e-08"),
        ({"elastic_net": {"weight": 1e-2, "l1_ratio": 0.9}}, "2 of 3 parameters (0.weight, 2.weight)", "1.3e-08"),
        ({"weight_l2": graphreg.by_depth(0, 0.02)}, "1 of 3 parameters (2.weight)", "2.5e-08"),
    ],
)
def test_it_is_said_of_each_parameter(given: dict[str, object], where: str, pull: str, log: list[str]) -> None:
    """Not only if all parameters are below the threshold. Where a strength is 0, it is off on purpose."""
    (name,) = given
    plan = graphreg.plan(graphreg.trace(UNEVEN), graphreg.from_kwargs(UNEVEN, **given))
    said = PART.format(where, pull)
    assert f"\n{name}: {said}" in str(plan)
    assert notes(graphreg.regularize(UNEVEN, **given)) == [said]
    assert log == [f"{name} is {said}"]


@pytest.mark.parametrize(
    ("given", "pull"),
    [({"hidden_l1": 1e-7}, "5e-08"), ({"hidden_l2": 1e-8}, "1e-08"), ({"z_loss": {"weight": 1e-9, "pattern": "4"}}, "2e-09")],
)
def test_a_penalty_on_values(given: dict[str, object], pull: str, log: list[str]) -> None:
    """Its pull is the derivative by a number that all elements of a value have, which does not depend on their count."""
    (name,) = given
    said = f"practically off: it pulls a value of 1 like a weight_decay of {pull} in SGD, or less; give a larger weight"
    for x in (None, torch.ones(2, 512)):
        assert notes(graphreg.regularize(UNEVEN, **given, example_inputs=x)) == [said]
    assert log == 2 * [f"{name} is {said}"]


def test_the_pull_on_values_is_the_gradient() -> None:
    for key in ("hidden_l1", "hidden_l2"):
        (penalty,) = graphreg.from_kwargs(NET, **{key: 1.0})
        number = torch.ones((), requires_grad=True)
        penalty(number.expand(5, 7)).backward()
        assert number.grad is not None and isinstance(penalty, graphreg.Penalty) and number.grad.item() == penalty.slope(1)
    steps = torch.stack((torch.zeros(5, 7), torch.ones(5, 7))).requires_grad_()
    (penalty,) = graphreg.from_kwargs(NET, recurrent_state={"weight": 1.0, "pattern": "0"})
    penalty(steps, None).backward()
    assert steps.grad is not None and isinstance(penalty, graphreg.Penalty)
    assert steps.grad[1].sum().item() == pytest.approx(penalty.slope(1))


def test_the_present_strength_counts() -> None:
    module = graphreg.regularize(NET, weight_l2=1e-4)
    graphreg.set_strength(module, "weight_l2", 1.0)
    assert notes(module) == []
    graphreg.set_strength(module, "weight_l2", {"0.weight": 1e-4, "2.weight": 1e-5})
    assert notes(module) == [OFF.format("3.8e-10")]


def test_a_sum_that_is_off_gets_the_other_advice() -> None:
    module = graphreg.regularize(NET, weight_l2={"weight": 1e-9, "reduction": "sum"})
    assert notes(module) == [OFF.format("2e-09").removesuffix(", or reduction='sum'")]


def test_a_penalty_of_ones_own_is_named_if_it_has_a_slope() -> None:
    class Cubes(graphreg.Penalty, on="parameters"):
        def __call__(self, w: torch.Tensor) -> torch.Tensor:
            return w.abs().pow(3).mean()

    class Sloped(Cubes):
        def slope(self, elements: int) -> float:
            return 3 / elements

    assert notes(graphreg.regularize(NET, Cubes("*", 1e-6))) == []
    assert notes(graphreg.regularize(NET, Sloped("*", 1e-6))) == [OFF.format("5.7e-12").removesuffix(", or reduction='sum'")]


def test_the_backend_reports_it() -> None:
    backend = graphreg.backend(weight_l2=1e-4, inner="eager")
    torch.compile(NET, backend=backend)(torch.ones(1, 512))
    assert [note for entry in graphreg.report(backend).regularizers for note in entry.notes if "practically" in note] == [
        OFF.format("3.8e-10")
    ]
