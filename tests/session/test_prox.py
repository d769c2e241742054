"""``prox_``: proximal steps against closed forms and against the gradients of the same penalties."""

from __future__ import annotations

import copy
import math
import pickle
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import graphreg
from graphreg import GraphRegError, Penalty, RegularizerError, schedules
from graphreg.passes import ElasticNet, GroupLasso, MaxNorm, WeightL1

X = torch.randn(16, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
LR = 0.1


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).double()


def stepped(module: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor = X) -> None:
    """Make one step of the optimizer."""
    optimizer.zero_grad()
    result = module(x)
    output = result.output if isinstance(result, graphreg.Regularized) else result
    output.square().mean().backward()
    optimizer.step()


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def prox(penalty: Penalty, w: Tensor, step: float) -> Tensor:
    return penalty.prox(w, torch.tensor(step, dtype=w.dtype))


# Each penalty by itself

W = torch.tensor([[3.0, -4.0], [0.3, 0.4]], dtype=torch.float64)
BY_HAND: list[tuple[Penalty, float, list[list[float]]]] = [
    (WeightL1("*", 1, reduction="sum", by="prox"), 0.35, [[2.65, -3.65], [0, 0.05]]),
    (WeightL1("*", 1, by="prox"), 1.4, [[2.65, -3.65], [0, 0.05]]),  # the mean over 4 weights: thresholds of 1.4 / 4
    (ElasticNet("*", 1, l1_ratio=0.5, reduction="sum", by="prox"), 0.7, [[2.65 / 1.35, -3.65 / 1.35], [0, 0.05 / 1.35]]),
    (GroupLasso("*", 1, by="prox"), 1 / math.sqrt(2), [[2.4, -3.2], [0, 0]]),  # norms 5 and 0.5, thresholds of 1
    (GroupLasso("*", 1, axis="elements", by="prox"), 0.35, [[2.65, -3.65], [0, 0.05]]),  # groups of one weight: the lasso
    (MaxNorm("*", 1, limit=2.5, by="prox"), 1e-9, [[1.5, -2], [0.3, 0.4]]),
]  # fmt: skip


@pytest.mark.parametrize(("penalty", "step", "expected"), BY_HAND)
def test_by_hand(penalty: Penalty, step: float, expected: list[list[float]]) -> None:
    torch.testing.assert_close(prox(penalty, W, step), torch.tensor(expected, dtype=torch.float64))
    assert torch.equal(prox(penalty, W, 0.0), W)
    assert torch.equal(prox(penalty, torch.zeros_like(W), 0.5), torch.zeros_like(W))


groupings = st.sampled_from([(0, 1), (1, 1), (-1, 2), (0, 3), (2, 2), ("elements", 1), ("elements", 4), ("elements", 8)])


@given(groupings, st.sampled_from(["mean", "sum"]), st.floats(0.01, 5), st.integers(0, 99))
def test_it_minimizes_the_formula_and_the_distance(grouping: tuple[Any, int], reduction: str, step: float, seed: int) -> None:
    """Nothing near the result is better, and where the result is not 0, it is a step along the formula's gradient."""
    axis, size = grouping
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(3, 2, 4, generator=generator, dtype=torch.float64)
    for penalty in (
        WeightL1("*", 1, reduction=reduction, by="prox"), ElasticNet("*", 1, l1_ratio=0.7, reduction=reduction, by="prox"),
        GroupLasso("*", 1, axis=axis, group_size=size, reduction=reduction, by="prox"),
    ):  # fmt: skip
        v = prox(penalty, w, step).requires_grad_()
        assert v.shape == w.shape
        (gradient,) = torch.autograd.grad(penalty(v), v)
        left = (v != 0).detach()
        torch.testing.assert_close((w - v)[left], step * gradient[left])
        best = step * penalty(v) + (v - w).square().sum() / 2
        for scale in (1e-3, 0.3):
            other = v + scale * torch.randn(w.shape, generator=generator, dtype=torch.float64)
            assert step * penalty(other) + (other - w).square().sum() / 2 >= best


def test_groups() -> None:
    """Heads of 2 rows, columns, filters, kernels in rows of 9: what is 0 is a whole group."""
    w = torch.ones(4, 2, 3, 3, dtype=torch.float64)
    w[:2] = 0.01
    for options in ({}, {"group_size": 2}, {"axis": "elements", "group_size": 9}):
        v = prox(GroupLasso("*", 1, by="prox", **options), w, 0.05)
        assert not v[:2].any() and v[2:].all()
    v = prox(GroupLasso("*", 1, axis=1, by="prox"), w.transpose(0, 1), 0.05)
    assert not v[:, :2].any() and v[:, 2:].all()


# The step as a whole

Make = Callable[..., Any]


def as_module(*penalties: Any, **options: Any) -> Any:
    return graphreg.regularize(net(), *penalties, **options)


def in_place(*penalties: Any, **options: Any) -> Any:
    return graphreg.regularize_(net(), *penalties, example_inputs=X, **options)


def compiled(*penalties: Any, **options: Any) -> Any:
    return graphreg.regularize(net(), *penalties, compile={"backend": "aot_eager"}, **options)


def in_blocks(*penalties: Any, **options: Any) -> Any:
    return graphreg.regularize(net(), *penalties, blocks="0", example_inputs=X, **options)


@pytest.mark.parametrize("make", [as_module, in_place, compiled, in_blocks])
def test_the_penalty_is_the_one_that_has_a_gradient(make: Make) -> None:
    """Where the result is not 0, w − v is lr times the gradient at v of the same penalty by gradient: mean, sites, strengths."""
    by_site = {"0.weight": 0.9, "2.weight": 0.2}
    module, twin = make(weight_l1={"weight": 0.5, "by": "prox"}), as_module(weight_l1=0.5)
    for each in (module, twin):
        graphreg.set_strength(each, "weight_l1", by_site)
    optimizer = torch.optim.SGD(module.parameters(), LR)
    for _ in range(3):
        stepped(module, optimizer)
        before, identity = weights(module), [id(p) for p in module.parameters()]
        graphreg.prox_(module, optimizer)
        assert [id(p) for p in module.parameters()] == identity
        twin.load_state_dict(weights(module))
        total = twin(X).penalties["weight_l1"]
        for name, gradient in zip(before, torch.autograd.grad(total, list(twin.parameters()), allow_unused=True), strict=True):
            after, left = weights(module)[name], weights(module)[name] != 0
            assert gradient is not None or torch.equal(after, before[name])
            if gradient is not None:
                torch.testing.assert_close((before[name] - after)[left], LR * gradient[left])
    assert graphreg.site_strengths(module) == {"weight_l1": by_site}


@pytest.mark.parametrize("rule", [torch.optim.SGD, torch.optim.AdamW])
def test_rates_of_the_groups_and_of_the_step(rule: Any) -> None:
    """Each group has its rate, and a scheduler that goes on before ``prox_`` changes nothing."""
    module = as_module(WeightL1("*", 0.3, reduction="sum", by="prox"))
    first, last = module.get_submodule("0"), module.get_submodule("2")
    optimizer = rule([{"params": first.parameters()}, {"params": last.parameters(), "lr": torch.tensor(0.01)}], lr=0.1, foreach=False)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    for step in range(2):
        stepped(module, optimizer)
        before = weights(module)
        scheduler.step()
        graphreg.prox_(module, optimizer)
        for name, rate in (("0.weight", 0.1), ("2.weight", 0.01)):
            limit = 0.3 * rate * 0.5**step
            torch.testing.assert_close(weights(module)[name], before[name].sign() * (before[name].abs() - limit).relu())


def test_lasso_with_orthonormal_features_has_its_closed_form() -> None:
    """argmin ½‖y − Xw‖² + λ Σ|w| for XᵀX = 1 is the soft threshold of Xᵀy; by gradient no weight is exactly 0."""
    torch.manual_seed(0)
    x = torch.linalg.qr(torch.randn(30, 8, dtype=torch.float64))[0]
    truth = torch.tensor([[3.0, -2, 1, 0, 0, 0, 0, 0]], dtype=torch.float64)
    y = x @ truth.T + 0.05 * torch.randn(30, 1, dtype=torch.float64)
    best = (y.T @ x).sign() * ((y.T @ x).abs() - 0.3).relu()
    found = {}
    for by in ("prox", "gradient"):
        model = nn.Linear(8, 1, bias=False).double()
        module = graphreg.regularize(model, weight_l1={"weight": 0.3, "reduction": "sum", "by": by})
        optimizer = torch.optim.SGD(module.parameters(), 0.5)
        for _ in range(60):
            output, penalties = module(x)
            optimizer.zero_grad()
            ((output - y).square().sum() / 2 + sum(penalties.values())).backward()
            optimizer.step()
            if by == "prox":
                graphreg.prox_(module, optimizer)
        found[by] = model.weight.detach()
    torch.testing.assert_close(found["prox"], best)
    assert int((best == 0).sum()) == int((found["prox"] == 0).sum()) == 5
    assert found["gradient"].all()


def test_a_schedule_has_the_strength_of_the_forward() -> None:
    module = as_module(WeightL1("*", schedules.linear(0.0, 1.0, 4), reduction="sum", by="prox"))
    optimizer = torch.optim.SGD(module.parameters(), LR)
    for call in range(4):
        stepped(module, optimizer)
        before = weights(module)["0.weight"]
        graphreg.prox_(module, optimizer)
        torch.testing.assert_close(weights(module)["0.weight"], before.sign() * (before.abs() - LR * call / 4).relu())


def test_several_penalties_act_in_order_and_a_tied_weight_once() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Tanh(), nn.Linear(4, 4, bias=False)).double()
    model[2].weight = model[0].weight
    lasso, groups = WeightL1("*", 1.0, reduction="sum", by="prox"), GroupLasso("*", 1.0, reduction="sum", by="prox")
    module = graphreg.regularize(model, lasso, groups)
    optimizer = torch.optim.SGD(module.parameters(), LR)
    stepped(module, optimizer)
    before = model[0].weight.detach().clone()
    graphreg.prox_(module, optimizer)
    assert torch.equal(model[0].weight, prox(groups, prox(lasso, before, LR), LR))


@pytest.mark.parametrize("fused", [False, True])
def test_nothing_where_a_scaler_skips_the_step(fused: bool) -> None:
    module = graphreg.regularize(net().float(), weight_l1={"weight": 1.0, "by": "prox"})
    optimizer, scaler = torch.optim.AdamW(module.parameters(), LR, fused=fused), torch.amp.GradScaler("cpu", init_scale=4.0)
    for factor in (1.0, math.inf, 1.0):
        optimizer.zero_grad()
        scaler.scale((module(X.float()).output * factor).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        before = weights(module)
        graphreg.prox_(module, optimizer)
        same = all(torch.equal(before[name], p) for name, p in module.named_parameters())
        assert same == (factor == math.inf)


def test_once_a_step_and_not_where_it_is_off() -> None:
    module = as_module(weight_l1={"weight": 1.0, "by": "prox"})
    optimizer = torch.optim.SGD(module.parameters(), LR)
    graphreg.prox_(module, optimizer)  # no step was made yet
    assert all(torch.equal(p, q) for p, q in zip(module.parameters(), net().parameters(), strict=True))
    stepped(module, optimizer)
    graphreg.prox_(module, optimizer)
    before = weights(module)
    graphreg.prox_(module, optimizer)
    assert all(torch.equal(before[name], p) for name, p in module.named_parameters())
    module.get_submodule("0").requires_grad_(False)
    with graphreg.penalties_off(module):
        stepped(module, optimizer)
        before = weights(module)
        graphreg.prox_(module, optimizer)
        assert all(torch.equal(before[name], p) for name, p in module.named_parameters())
    stepped(module, optimizer)
    before = weights(module)
    graphreg.prox_(module, optimizer)
    changed = [name for name, p in module.named_parameters() if not torch.equal(before[name], p)]
    assert changed == ["2.weight"]  # the other weight is frozen


def test_a_step_without_it_warns_once() -> None:
    module, other = as_module(weight_l1={"weight": 1.0, "by": "prox"}), net()
    optimizer, of_other = torch.optim.SGD(module.parameters(), LR), torch.optim.SGD(other.parameters(), LR)
    for _ in range(2):
        stepped(other, of_other)
        stepped(module, optimizer)
        graphreg.prox_(module, optimizer)
    stepped(module, optimizer)
    with pytest.warns(UserWarning, match=re.escape("by='prox' at 0.weight, 2.weight did nothing. Call graphreg.prox_(module, optimizer)")):
        module(X)
    for _ in range(2):
        stepped(module, optimizer)
    again = graphreg.regularize(graphreg.strip(module), weight_l1={"weight": 1.0, "by": "prox"})
    again(X)  # the last step was made before there was this module


def test_copies_and_pickles() -> None:
    module = as_module(weight_l1={"weight": 1.0, "by": "prox", "reduction": "sum"})
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        optimizer = torch.optim.SGD(twin.parameters(), LR)
        stepped(twin, optimizer)
        before = weights(twin)["0.weight"]
        graphreg.prox_(twin, optimizer)
        torch.testing.assert_close(weights(twin)["0.weight"], before.sign() * (before.abs() - LR).relu())


def test_half_precision_is_computed_in_float32() -> None:
    module = graphreg.regularize(net().bfloat16(), WeightL1("0.weight", 1.0, reduction="sum", by="prox"))
    optimizer = torch.optim.SGD(module.parameters(), LR)
    stepped(module, optimizer, X.bfloat16())
    w = weights(module)["0.weight"].float()
    graphreg.prox_(module, optimizer)
    assert torch.equal(weights(module)["0.weight"], (w.sign() * (w.abs() - torch.tensor(LR)).relu()).bfloat16())


# What is said of it


def test_it_is_in_no_graph_and_in_no_penalties() -> None:
    module = as_module(weight_l1={"weight": 1.0, "by": "prox"}, weight_l2=0.1)
    assert list(module(X).penalties) == ["weight_l2"] and "weight_l1" not in module.code
    assert graphreg.strengths(module) == {"weight_l1": 1.0, "weight_l2": 0.1}
    assert graphreg.strength_buffers(module).keys() == {"weight_l2"}
    attached = graphreg.regularize(net(), weight_l1={"weight": 1.0, "by": "prox"}, penalties="attach", example_inputs=X)
    assert torch.equal(attached(X), net()(X))
    assert graphreg.recipe(module)["regularizers"][0]["by"] == "prox"
    again = graphreg.regularize(net(), recipe=graphreg.recipe(module))
    assert again.code == module.code


def test_the_report_counts_zeros(tmp_path: Path) -> None:
    module = as_module(weight_l1={"weight": 1.0, "by": "prox", "pattern": "0.weight"})
    with torch.no_grad():
        module.get_submodule("0").weight[:3] = 0
    report = graphreg.report(module, cost=False)
    (entry,) = report.regularizers
    assert entry.trains == ("0.weight",) and not report.sites[0].acts[0].gone and report.sites[0].acts[0].does == "changes"
    how = "not in penalties: graphreg.prox_ applies it after the optimizer's step"
    assert entry.notes == (f"{how}; 12 of 24 weights are exactly 0 (50.0%)",)
    assert "[weight: weight_l1 1]" in graphreg.draw(module, tmp_path / "net.dot").read_text()


def refused(kind: type[Exception], text: str, call: Callable[[], Any]) -> None:
    with pytest.raises(kind, match=f"^{re.escape(text)}"):
        call()


class Rateless(torch.optim.Optimizer):
    def step(self) -> None:  # type: ignore[override]
        """Do nothing."""


class NoProx(Penalty, on="parameters"):
    by: str = "gradient"

    def __call__(self, w: Tensor) -> Tensor:
        return w.square().mean()


def test_errors() -> None:
    module, other = as_module(weight_l1={"weight": 1.0, "by": "prox"}), net()
    optimizer: Mapping[str, Any] = {"of other": torch.optim.SGD(other.parameters(), LR)}
    refused(RegularizerError, "WeightL1: by='proximal' is not allowed; by must be 'gradient' or 'prox'.",
            lambda: WeightL1("*", 1.0, by="proximal"))  # fmt: skip
    refused(RegularizerError, "NoProx: by='prox' is not allowed; by must be 'gradient': the class has no method prox, or",
            lambda: NoProx("*", 1.0, by="prox"))  # fmt: skip
    refused(RegularizerError, "GroupLasso: group_size=0 is not allowed; group_size must be a whole number above 0.",
            lambda: GroupLasso("*", 1.0, group_size=0))  # fmt: skip
    refused(RegularizerError, "GroupLasso at 0.weight: group_size=4 does not divide the length 6 of axis 0. Give a divisor of it.",
            lambda: as_module(GroupLasso("0.weight", 1.0, group_size=4)))  # fmt: skip
    refused(RegularizerError, "GroupLasso at 0.weight: group_size=3 does not divide the length 4 of a row. Give a divisor of it.",
            lambda: as_module(GroupLasso("0.weight", 1.0, axis="elements", group_size=3)))  # fmt: skip
    refused(RegularizerError, "optimizer='sgd' is not allowed; give the torch.optim.Optimizer that made the step.",
            lambda: graphreg.prox_(module, "sgd"))  # type: ignore[arg-type]  # fmt: skip
    refused(GraphRegError, "no penalty of this module has by='prox', so prox_ has nothing to do.",
            lambda: graphreg.prox_(as_module(weight_l1=1.0), optimizer["of other"]))  # fmt: skip
    refused(RegularizerError, "the optimizer has no parameter at which weight_l1 acts.",
            lambda: graphreg.prox_(module, optimizer["of other"]))  # fmt: skip
    refused(RegularizerError, "weight_l1: by='prox' is not possible in a backend, because graphreg.prox_ takes a regularized module.",
            lambda: graphreg.backend(weight_l1={"weight": 1.0, "by": "prox"}))  # fmt: skip
    rateless = Rateless(module.parameters(), {})
    rateless.step()
    refused(RegularizerError, "group 0 of the optimizer has no learning rate (lr), by which prox_ measures its step.",
            lambda: graphreg.prox_(module, rateless))  # fmt: skip
    del module.get_submodule("0").weight
    refused(GraphRegError, "weight_l1: the module has no parameter 0.weight any more. Regularize the model again.",
            lambda: graphreg.prox_(module, rateless))  # fmt: skip
