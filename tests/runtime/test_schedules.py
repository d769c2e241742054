"""Schedules: strengths that follow a count of training calls, in eager and compiled code, in copies, in place and in a backend."""

from __future__ import annotations

import copy
import json
import math
import pickle
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from perceptron import perceptron
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.utils.checkpoint import checkpoint

import graphreg
from graphreg import GraphRegError, NoMatchError, RegularizerError, schedules
from graphreg.passes import L2SP, BernoulliDropout, ConcreteDropout, Contractive, DropPath, HiddenL1, L0Gates, WeightL1, WeightL2
from graphreg.runtime.clock import _table, strengths_at
from lowering_check import check

X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
RATES, WEIGHTS = schedules.linear(0, 0.5, 4), schedules.piecewise({0: 0.0, 2: 2.0})


def clock(module: Any) -> int:
    count: int = graphreg.rng_state(module)["clock"]
    return count


class Dropping(nn.Module):
    """A perceptron with a dropout of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.hid, self.drop, self.out = nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.out(self.drop(torch.relu(self.hid(x))))
        return y


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + torch.relu(self.lin(x))
        return y


class Attending(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(x, x, x, dropout_p=0.5 if self.training else 0.0)


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.MultiheadAttention(2, 1, dropout=0.5, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.heads(x, x, x)[0]
        return y


def blocks() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block(), Block(), nn.Linear(4, 2))


def dropping() -> Dropping:
    torch.manual_seed(0)
    return Dropping()


def results(module: nn.Module, call: Callable[..., Any] | None = None) -> list[Tensor]:
    """The output, the penalties and the gradients of a call."""
    output, penalties = (module if call is None else call)(X)
    gradients = torch.autograd.grad(output.square().sum() + sum(penalties.values()), list(module.parameters()))
    return [output.detach(), *(value.detach() for value in penalties.values()), *gradients]


# the schedules themselves


def test_by_hand() -> None:
    for made, values in (
        (schedules.linear(0, 0.5, 4), [0, 0.125, 0.25, 0.375, 0.5, 0.5]),
        (schedules.linear(1, -1, 2, every=2), [1, 1, 0, 0, -1, -1]),
        (schedules.cosine(2, 0, 2), [2, 1, 0, 0, 0, 0]),
        (schedules.cosine(0, 1, 3), [0, 0.25, 0.75, 1, 1, 1]),
        (schedules.piecewise({3: 0.25, 0: 0.5, 1: 0}), [0.5, 0, 0, 0.25, 0.25, 0.25]),
        (schedules.piecewise({0: 1, 1: 2}, every=3), [1, 1, 1, 2, 2, 2]),
    ):
        assert [made.at(call) for call in range(6)] == pytest.approx(values, abs=1e-15)
        assert made.at(10**15) == values[-1]


def test_as_values() -> None:
    made = schedules.linear(0, -0.5, 100, every=4)
    assert repr(made) == str(made) == f"{made:g}" == "linear(0, -0.5, 100, every=4)" and float(made) == -0.5
    assert repr(WEIGHTS) == "piecewise({0: 0, 2: 2})" and repr(schedules.cosine(1, 2, 3)) == "cosine(1, 2, 3)"
    assert made == schedules.linear(0.0, -0.5, 100, every=4) and hash(made) == hash(schedules.linear(0.0, -0.5, 100, every=4))
    assert made != schedules.linear(0, -0.5, 100) and made != schedules.cosine(0, -0.5, 100, every=4) and made != -0.5
    for twin in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert twin == made and twin.pieces == made.pieces
    assert schedules.linear(numpy.float64(0), torch.tensor(0.5), numpy.int64(4)) == RATES  # type: ignore[arg-type]


NUMBERS = st.floats(-1e6, 1e6, allow_nan=False)
STEPS = st.integers(1, 2**53)
EVERY = st.integers(1, 1000)
SCHEDULES = st.one_of(
    st.builds(schedules.linear, NUMBERS, NUMBERS, STEPS, every=EVERY),
    st.builds(schedules.cosine, NUMBERS, NUMBERS, STEPS, every=EVERY),
    st.builds(lambda pairs, first, every: schedules.piecewise({**pairs, 0: first}, every=every),
              st.dictionaries(STEPS, NUMBERS, max_size=4), NUMBERS, EVERY),
)  # fmt: skip


@given(st.lists(SCHEDULES, min_size=1, max_size=4), st.integers(0, 2**53))
def test_tensors_compute_what_the_schedules_say(several: list[schedules.Schedule], call: int) -> None:
    table = _table(several, max(len(each.pieces) for each in several))
    found = strengths_at(table, torch.tensor([call])).tolist()
    for value, each in zip(found, several, strict=True):
        exact = each.kind != "cosine"  # torch and Python differ in the last bit of a cosine
        assert value == each.at(call) if exact else math.isclose(value, each.at(call), rel_tol=1e-9, abs_tol=1e-9)
        assert min(each.values) <= value <= max(each.values) or math.isclose(value, each.at(call), rel_tol=1e-12)


@given(SCHEDULES)
def test_plain_data(made: schedules.Schedule) -> None:
    assert schedules.of_plain(json.loads(json.dumps(made.to_plain()))) == made


def test_what_is_no_schedule() -> None:
    for data in (0.1, None, {"linear": 0.1}, {"linear": [0, 1, 2], "other": 1}, {"linear": [0, 1, 2], "cosine": [0, 1, 2]}, {"by": [1]}):
        assert schedules.of_plain(data) is None


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: schedules.linear("0", 1, 10), r"linear: start is '0'; it must be a finite number: linear\(0, 0\.5, 1000\)\."),
        (lambda: schedules.cosine(0, math.inf, 10), r"cosine: stop is inf; it must be a finite number: cosine\(0, 0\.5, 1000\)\."),
        (lambda: schedules.linear(0, True, 10), r"linear: stop is True; it must be a finite number"),
        (lambda: schedules.linear(0, 1, 0), r"linear: steps=0 is not allowed; steps is the number of steps, a whole number of 1 or more\."),
        (lambda: schedules.linear(0, 1, 1.5), r"linear: steps=1\.5 is not allowed"),
        (lambda: schedules.linear(0, 1, 2**53 + 1), r"linear: steps=9007199254740993 is not allowed"),
        (lambda: schedules.cosine(0, 1, 2, every=0), r"cosine: every=0 is not allowed; every is the number of calls that are a step"),
        (lambda: schedules.piecewise({}), r"piecewise: values=\{\} is not allowed; write piecewise\(\{0: 0\.0, 1000: 0\.1\}\)"),
        (lambda: schedules.piecewise([1]), r"piecewise: values=\[1\] is not allowed; write piecewise"),
        (lambda: schedules.piecewise({0: 1, -1: 2}), r"piecewise: the step -1 is not allowed; a step is a whole number, 0 or more\."),
        (lambda: schedules.piecewise({5: 1, 9: 2}), r"piecewise: the strength before step 5 is not given; write .*from step 0 on"),
        (lambda: schedules.piecewise({0: None}), r"piecewise: the strength from step 0 on is None; it must be a finite number"),
        (
            lambda: schedules.linear(0, graphreg.by_depth(0, 1), 9),
            r"linear: stop is by_depth\(0, 1\); .* by_depth\(0, linear\(0, 0\.5, 1000\)\)",
        ),
        (lambda: schedules.linear(RATES, 1, 9), r"linear: start is linear\(0, 0\.5, 4\); it must be a finite number"),
        (lambda: RATES * 2, r"linear\(0, 0\.5, 4\) is a schedule, and cannot be computed with\. Give other numbers to schedules\.linear\."),
        (lambda: 1 - WEIGHTS, r"piecewise\(\{0: 0, 2: 2\}\) is a schedule, and cannot be computed with"),
        (lambda: schedules.of_plain({"linear": [0, 1]}), r"linear=\[0, 1\] is not allowed; give a list \[start, stop, steps\]"),
        (lambda: schedules.of_plain({"piecewise": [1]}), r"piecewise=\[1\] is not allowed; give a list of pairs \[step, strength\]"),
        (
            lambda: graphreg.by_depth(RATES, WEIGHTS),
            r"by_depth: linear\(0, 0\.5, 4\) and piecewise\(.*\) are not allowed together; give two sch",
        ),
        (
            lambda: graphreg.by_depth(RATES, schedules.linear(0, 1, 5)),
            r"are not allowed together; give two schedules of one kind, with the sam",
        ),
        (
            lambda: BernoulliDropout("*", schedules.linear(0, 1, 10)),
            r"BernoulliDropout: weight=1\.0 is not .* The schedule linear\(0, 1, 10\) has",
        ),
        (
            lambda: WeightL2("*", schedules.piecewise({0: 1, 1: -1, 2: 1})),
            r"WeightL2: weight=-1\.0 is not allowed; .* The schedule piecewise",
        ),
        (
            lambda: DropPath("*", graphreg.by_depth(0, schedules.linear(0, 1, 9))),
            r"DropPath: weight=1\.0 is not .* The schedule by_depth\(0, linear",
        ),
        (
            lambda: Contractive("*", graphreg.by_depth(0, RATES)),
            r"Contractive: weight=by_depth\(0, linear\(.*\)\) is not allowed, because the",
        ),
    ],
)  # fmt: skip
def test_errors(make: Callable[[], Any], says: str) -> None:
    with pytest.raises(RegularizerError, match=says):
        make()


# in the graph


def test_the_whole_graph() -> None:
    """Next to that of the same regularizers without a schedule, which has no clock."""
    module = graphreg.regularize(perceptron(), hidden_dropout=RATES, weight_l2=WEIGHTS, hidden_l1=0.1, rng=0)
    assert module.code == '''


def forward(self, x):
    key = self.graphreg_rules.key()
    clock = self.graphreg_rules.clock()
    hid = self.hid(x);  x = None
    relu = torch.relu(hid);  hid = None
    relu_hidden_dropout = self.graphreg_rules.relu_hidden_dropout(relu, key, clock = clock);  relu = key = None
    relu_hidden_l1 = self.graphreg_rules.relu_hidden_l1(relu_hidden_dropout)
    out = self.out(relu_hidden_dropout);  relu_hidden_dropout = None
    hid_weight = self.hid.weight
    out_weight = self.out.weight
    weight_l2 = self.graphreg_rules.weight_l2(hid_weight, out_weight, clock = clock);  hid_weight = out_weight = clock = None
    hidden_l1 = self.graphreg_rules.hidden_l1(relu_hidden_l1);  relu_hidden_l1 = None
    return graphreg_Regularized(out, {'weight_l2': weight_l2, 'hidden_l1': hidden_l1})
    '''
    plain = graphreg.regularize(perceptron(), hidden_dropout=0.5, weight_l2=2.0, hidden_l1=0.1, rng=0)
    assert plain.code == module.code.replace("    clock = self.graphreg_rules.clock()\n", "").replace(", clock = clock", "").replace(
        " = clock = None", " = None"
    )
    assert "clock" not in graphreg.strip(module).code and not dict(module.state_dict()).keys() - dict(perceptron().state_dict()).keys()


def test_each_call_has_its_strengths_bit_for_bit() -> None:
    """As a module that is given the numbers: the masks, penalties and gradients of each call."""
    model = perceptron()
    module = graphreg.regularize(model, hidden_dropout=RATES, weight_l2=WEIGHTS, weight_l1=schedules.cosine(1, 0.5, 4), rng=0)
    plain = graphreg.regularize(model, BernoulliDropout("*", 0.0, name="hidden_dropout"), weight_l2=2.0, weight_l1=1.0, rng=0)
    for call in range(6):
        expected = {"hidden_dropout": RATES.at(call), "weight_l2": WEIGHTS.at(call), "weight_l1": schedules.cosine(1, 0.5, 4).at(call)}
        assert graphreg.strengths(module) == pytest.approx(expected, abs=1e-15) and clock(module) == call
        for name, value in graphreg.strengths(module).items():
            graphreg.set_strength(plain, name, value)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(results(module), results(plain), strict=True))


def test_without_splices() -> None:
    module = graphreg.regularize(perceptron(), HiddenL1("*", schedules.linear(0, 1, 2)))
    assert graphreg.rng_state(module) == {"version": 2, "call": 0, "ranks": "differ", "streams": {}, "clock": 0}
    z = perceptron().hid(X).relu().abs().mean()
    found = [float(module(X).penalties["hidden_l1"].detach()) for _ in range(3)]
    assert found == pytest.approx([0, float(z.detach()) / 2, float(z.detach())])


def test_a_start_of_0_is_not_off() -> None:
    rising, always = schedules.linear(0, 0.5, 10), schedules.piecewise({0: 0.0})
    module = graphreg.regularize(perceptron(), hidden_dropout=rising, weight_l2=always, hidden_l1={"weight": rising, "pattern": "relu"})
    assert graphreg.strengths(module) == {"hidden_dropout": 0.0, "weight_l2": 0.0, "hidden_l1": 0.0}
    assert graphreg.strengths(graphreg.regularize(perceptron(), dropout={"relu": always})) == {"dropout": 0.0}


def test_what_does_not_move_the_clock() -> None:
    model = perceptron()
    module = graphreg.regularize(model, hidden_dropout=RATES, hidden_l1=schedules.linear(0.5, 1, 10), rng=0)
    module(X)
    module.eval()
    assert torch.equal(module(X).output, model(X)) and clock(module) == 1
    expected = 0.55 * float(model.hid(X).relu().abs().mean().detach())
    assert float(module(X).penalties["hidden_l1"].detach()) == pytest.approx(expected)  # the present strength, in eval mode too
    graphreg.sample(module, X, 3)
    module.hid.train()  # part of the model is in train mode: no training call of the whole
    module(X)
    assert clock(module) == 1
    module.train()
    for block in (graphreg.noise_off, graphreg.noise_on):
        with block(module):
            module(X)
        assert clock(module) == 1
    with graphreg.frozen_noise(module):
        first, second = module(X), module(X)
        with graphreg.frozen_noise(module):
            module(X)
        assert torch.equal(first.output, second.output) and graphreg.strengths(module)["hidden_l1"] == pytest.approx(0.55)
    assert clock(module) == 2
    with graphreg.frozen_noise(module):
        pass
    assert clock(module) == 2


def test_recomputation() -> None:
    """Around the whole module it is refused, but for frozen noise; of blocks inside, it takes the strengths of the forward."""
    model = blocks()
    rising = schedules.linear(0.1, 0.5, 4)
    module = graphreg.regularize(model, hidden_l1=rising)
    y = checkpoint(module, X, use_reentrant=False)
    with pytest.raises(GraphRegError, match=r"inside a backward pass, and its clock has moved on since the forward: activation checkpoint"):
        (y.output.sum() + y.penalties["hidden_l1"]).backward()
    with graphreg.frozen_noise(module):
        results(module, lambda x: checkpoint(module, x, use_reentrant=False))
    assert clock(module) == 2
    module, other = (graphreg.regularize(model, hidden_dropout=rising, hidden_l1=rising, rng=0, blocks=b) for b in (None, "[012]"))
    apply_activation_checkpointing(other, check_fn=lambda inner: type(inner).__name__ == "Block")
    for _ in range(3):
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(results(module), results(other), strict=True))
    assert clock(module) == clock(other) == 3


def test_accumulation() -> None:
    module = graphreg.regularize(perceptron(), weight_l2=schedules.linear(0, 1, 2, every=3))
    found = []
    for _ in range(8):
        found.append(graphreg.strengths(module)["weight_l2"])
        module(X)
    assert found == [0, 0, 0, 0.5, 0.5, 0.5, 1, 1]


def test_large_steps_are_divided_in_float64() -> None:
    """Division of integers in float32, as torch does it, would give 0.5."""
    module = graphreg.regularize(perceptron(), weight_l2=schedules.linear(0, 1, 2**25))
    graphreg.set_rng_state(module, {**graphreg.rng_state(module), "clock": 2**24 + 1})
    assert graphreg.strengths(module)["weight_l2"] == 0.5 + 2**-25


# every kind of regularizer


def test_formulas_that_take_all_values_and_derivatives_and_states() -> None:
    model = blocks()
    rising = schedules.linear(0.5, 1, 2)
    penalties = [Contractive("**@relu", rising), L2SP("*", rising), graphreg.build("variance_floor", weight=rising, pattern="**@relu")]
    module, plain = (graphreg.regularize(model, [*made, WeightL1("*", 0.1)], rng=0) for made in (penalties, [
        Contractive("**@relu", 1.0), L2SP("*", 1.0), graphreg.build("variance_floor", weight=1.0, pattern="**@relu")
    ]))  # fmt: skip
    for each in (module, plain):
        each(X)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    ours, theirs = module(X).penalties, plain(X).penalties
    for name in ("contractive", "l2_sp", "variance_floor"):
        torch.testing.assert_close(ours[name], 0.75 * theirs[name])
    torch.testing.assert_close(ours["weight_l1"], theirs["weight_l1"])


@pytest.mark.parametrize("kind", [L0Gates, ConcreteDropout])
def test_a_splice_that_learns(kind: Any) -> None:
    """The penalty of its own parameters follows the schedule."""
    model, rising = perceptron(), schedules.linear(0.1, 0.5, 2)
    module, plain = (graphreg.regularize(model, kind("relu", weight), rng=0, example_inputs=X) for weight in (rising, 0.1))
    (name,) = graphreg.strengths(module)
    for _ in range(3):
        graphreg.set_strength(plain, name, graphreg.strengths(module)[name])
        ours, theirs = module(X), plain(X)
        assert torch.equal(ours.output, theirs.output) and torch.equal(ours.penalties[name], theirs.penalties[name])
    assert graphreg.strengths(module) == {name: 0.5}


class Scaled(graphreg.Penalty, keys=("scaled_by_its_weight",)):
    """A penalty that takes its own strength."""

    def __call__(self, z: Tensor, weight: Tensor) -> Tensor:
        return z.abs().mean() * weight


def test_a_penalty_that_takes_its_strength() -> None:
    module = graphreg.regularize(perceptron(), Scaled("relu", schedules.linear(1, 3, 2)))
    found = [float(module(X).penalties["scaled_by_its_weight"].detach()) for _ in range(3)]
    assert found == pytest.approx([found[0], 4 * found[0], 9 * found[0]])


def test_by_depth_and_by_site() -> None:
    model = blocks()
    ramp = graphreg.by_depth(0, schedules.linear(0, 0.4, 4))
    module = graphreg.regularize(model, drop_path=ramp, hidden_l2={"weight": graphreg.by_depth(0.2, 0.4), "pattern": "*.relu"}, rng=0)
    other = graphreg.regularize(model, hidden_l2={"weight": graphreg.by_depth(schedules.linear(0.1, 0.2, 1), schedules.linear(0.2, 0.4, 1)),
                                                  "pattern": "*.relu"})  # fmt: skip
    assert "drop_path: weight by_depth(0, linear(0, 0.4, 4))" in str(graphreg.plan(graphreg.trace(model), DropPath("*", ramp)))
    for call in range(3):
        assert graphreg.site_strengths(module)["drop_path"] == pytest.approx({f"{i}.relu": i / 2 * call * 0.1 for i in range(3)})
        assert graphreg.strengths(module)["drop_path"] == pytest.approx(call * 0.1)
        module(X)
    other(X)
    clean = graphreg.regularize(model, hidden_l2={"weight": graphreg.by_depth(0.2, 0.4), "pattern": "*.relu"})
    torch.testing.assert_close(other(X).penalties, clean(X).penalties)
    graphreg.set_strength(module, "drop_path", {"1.*": 0.3})  # the others keep their schedules
    module(X)
    assert graphreg.site_strengths(module)["drop_path"] == pytest.approx({"0.relu": 0, "1.relu": 0.3, "2.relu": 0.4})
    graphreg.set_strength(module, "drop_path", 0.25)
    assert set(graphreg.site_strengths(module)["drop_path"].values()) == {0.25}


def test_a_penalty_by_site() -> None:
    model = blocks()
    module = graphreg.regularize(model, hidden_l1={"weight": schedules.linear(1, 2, 1), "pattern": "*.relu"})
    graphreg.set_strength(module, "hidden_l1", {"0.*": 0.0, "1.*": 4.0})
    means, x = [], X
    for i in range(3):
        means.append(torch.relu(model[i].lin(x)).abs().mean())
        x = model[i](x)
    for last in (1, 2):
        torch.testing.assert_close(module(X).penalties["hidden_l1"], (4 * means[1] + last * means[2]) / 3)


# the model's own dropout


@pytest.mark.parametrize("make", [
    lambda: nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 2)),
    lambda: nn.Sequential(nn.Linear(4, 8), nn.AlphaDropout(0.5), nn.Linear(8, 2)),
    lambda: nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5, inplace=True), nn.Linear(8, 2)),
    lambda: nn.Sequential(nn.Linear(4, 4), nn.Unflatten(1, (2, 2)), Attending(), nn.Flatten(), nn.Linear(4, 2)),
    lambda: nn.Sequential(nn.Linear(4, 4), nn.Unflatten(1, (2, 2)), Heads(), nn.Flatten(), nn.Linear(4, 2)),
])  # fmt: skip
def test_native_dropout_as_at_a_fixed_rate(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = make()
    rates = schedules.piecewise({0: 0.25, 1: 0.0, 2: 0.6})
    module = graphreg.regularize(model, own_dropout=rates, rng=0, example_inputs=X)
    for call, rate in enumerate((0.25, 0.0, 0.6)):
        fixed = graphreg.regularize(model, own_dropout=rate or 1e-12, rng=0, example_inputs=X)
        graphreg.set_rng_state(fixed, {**graphreg.rng_state(fixed), "call": call})
        assert graphreg.strengths(module) == {"own_dropout": rate}
        for ours, theirs in zip(results(module), results(fixed), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
    assert torch.equal(module.eval()(X).output, model.eval()(X))


def test_native_dropout_is_reached() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 8), nn.Dropout(0.5), nn.Dropout(0.1))
    own = {"1": schedules.linear(0, 0.5, 10), "3": schedules.cosine(0.1, 0.2, 10), "4": 0.3}
    module = graphreg.regularize(model, own_dropout=own, rng=0)
    assert graphreg.site_strengths(module) == {"own_dropout": {"1": 0.0, "3": 0.1}} and graphreg.strengths(module) == {"own_dropout": 0.1}
    assert "seeded at linear(0, 0.5, 10)" in str(graphreg.plan(graphreg.trace(model), (), own_dropout=own))
    graphreg.set_strength(module, "own_dropout", {"3": 0.7})
    for _ in range(2):
        module(X)
    assert graphreg.site_strengths(module)["own_dropout"] == pytest.approx({"1": 0.1, "3": 0.7})
    assert "seeded at cosine(0.1, 0.2, 10), now 0.7" in graphreg.report(module).text(None)
    graphreg.set_strength(module, "own_dropout", 0.5)
    assert graphreg.site_strengths(module)["own_dropout"] == {"1": 0.5, "3": 0.5}
    for name, value, error, says in (
        ("own_dropout", 1.0, RegularizerError, r"own_dropout: 1\.0 is not allowed; give a rate in \[0, 1\), or a schedule of rates\."),
        ("own_dropout", {"4": 0.1}, NoMatchError, r"'4' matches no site of own_dropout\..* Its sites: 1, 3\."),
        (
            "1", 0.1, NoMatchError,
            r"no regularizer is named '1'\. Names: own_dropout\. The rate of a native dropout is set once, .* If it is a",
        ),
    ):
        with pytest.raises(error, match=says):
            graphreg.set_strength(module, name, value)  # type: ignore[arg-type]
    with pytest.raises(RegularizerError, match=r"own_dropout=linear\(0, 1, 5\) is not allowed; it is 'keep', 'seeded', 'off', or a rate"):
        graphreg.regularize(model, own_dropout=schedules.linear(0, 1, 5))
    with pytest.raises(RegularizerError, match=r"own_dropout=by_depth\(0, 0\.5\) is not allowed; it is 'keep'"):
        graphreg.regularize(model, own_dropout=graphreg.by_depth(0, 0.5))
    with pytest.raises(RegularizerError, match=r"name='clock' is a name that torch modules or graphreg use for themselves"):
        graphreg.regularize(model, WeightL2("*", 0.1, name="clock"), own_dropout=own)


# changing them


def test_set_strength_replaces_a_schedule() -> None:
    module = graphreg.regularize(perceptron(), hidden_dropout=RATES, weight_l2=WEIGHTS, weight_l1=0.5, rng=0)
    module(X)
    graphreg.set_strength(module, "hidden_dropout", 0.3)
    graphreg.set_strength(module, "weight_l2", schedules.linear(0, 1, 4))  # other numbers
    for call in range(1, 4):
        assert graphreg.strengths(module) == {"hidden_dropout": 0.3, "weight_l2": call / 4, "weight_l1": 0.5} and clock(module) == call
        module(X)
    for name, value, says in (
        ("hidden_dropout", schedules.linear(0, 1, 4), r"hidden_dropout: weight=1\.0 is not allowed; .* The schedule linear\(0, 1, 4\)"),
        (
            "weight_l1", RATES,
            r"weight_l1: linear\(0, 0\.5, 4\) is not allowed, because weight_l1 was given a number and has no clock\. Give the",
        ),
        (
            "weight_l2", schedules.piecewise({0: 1, 1: 2, 2: 3}),
            r"weight_l2: piecewise\(.*\) has 3 pieces, and there is room for 2, those of the",
        ),
        ("weight_l2", graphreg.by_depth(0, 1), r"set_strength takes a number or a dict of selectors to numbers, not by_depth\(0, 1\)"),
    ):
        with pytest.raises(RegularizerError, match=says):
            graphreg.set_strength(module, name, value)


# compiled


@pytest.fixture
def counted() -> Iterator[tuple[list[Any], Callable[..., Any]]]:
    torch._dynamo.reset()
    graphs: list[Any] = []
    aot: Any = torch._dynamo.lookup_backend("aot_eager")

    def backend(gm: Any, inputs: Any) -> Any:
        graphs.append(gm)
        return aot(gm, inputs)

    yield graphs, backend
    torch._dynamo.reset()


def everything() -> dict[str, Any]:
    return {
        "hidden_dropout": RATES, "drop_connect": schedules.cosine(0, 0.4, 3), "weight_l2": schedules.cosine(1, 0.1, 3),
        "hidden_l1": WEIGHTS, "own_dropout": {"drop": schedules.linear(0.6, 0.2, 3)}, "rng": 0,
    }  # fmt: skip


def test_one_graph_for_all_steps(counted: tuple[list[Any], Callable[..., Any]]) -> None:
    graphs, backend = counted
    eager, module = (graphreg.regularize(dropping(), **everything()) for _ in range(2))
    compiled = torch.compile(module, backend=backend, fullgraph=True)

    def alike() -> None:
        for ours, theirs in zip(results(eager), results(module, compiled), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
        assert graphreg.strengths(eager) == pytest.approx(graphreg.strengths(module))
        assert graphreg.rng_state(eager) == graphreg.rng_state(module)

    for _ in range(5):
        alike()
    for each in (eager, module):
        graphreg.set_strength(each, "hidden_dropout", 0.2)
        graphreg.set_strength(each, "weight_l2", {"hid.*": schedules.linear(0, 3, 9)})
        graphreg.set_strength(each, "own_dropout", schedules.cosine(0, 0.9, 20))
    alike()
    with graphreg.frozen_noise(eager), graphreg.frozen_noise(module):
        alike()
        alike()
    alike()
    assert clock(module) == 8 and len(graphs) == 1


def test_inductor() -> None:
    eager, module = (graphreg.regularize(perceptron(), hidden_dropout=RATES, weight_l2=schedules.cosine(1, 0, 3), rng=0) for _ in range(2))
    module.compile(fullgraph=True)
    for _ in range(3):
        for ours, theirs in zip(results(eager), results(module), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert graphreg.rng_state(eager) == graphreg.rng_state(module)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # of Dynamo's, also for plain blocks
def test_equal_blocks_compile_once(counted: tuple[list[Any], Callable[..., Any]]) -> None:
    graphs, backend = counted
    model = blocks()
    module, flat = (graphreg.regularize(model, hidden_dropout=RATES, hidden_l1=WEIGHTS, rng=0, blocks=b) for b in ("[012]", None))
    for i in range(3):
        module.get_submodule(str(i)).compile(backend=backend)
    for _ in range(4):
        for ours, theirs in zip(results(module), results(flat), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
    assert len(graphs) <= 2  # the first block may be apart, because its input needs no gradient


def test_functional_calls() -> None:
    module = graphreg.regularize(perceptron(), hidden_l1=schedules.linear(0, 1, 10))
    parameters = dict(module.named_parameters())

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Any:
        output, penalties = torch.func.functional_call(module, parameters, (x,))
        return output.sum() + sum(penalties.values())

    torch.func.grad(loss)(parameters, X)
    torch.func.vmap(loss, in_dims=(None, 0))(parameters, torch.randn(3, 5, 4))
    assert clock(module) == 2  # a batch is one call
    torch.compile(torch.func.grad(loss), backend="aot_eager", fullgraph=True)(parameters, X)
    assert clock(module) == 3
    buffers = dict(module.named_buffers())
    with pytest.raises(GraphRegError, match=r"functional_call was given the clock of the module's schedules: it would not advance\. Leave"):
        torch.func.functional_call(module, {**parameters, **buffers}, (X,))
    with (
        pytest.warns((DeprecationWarning, FutureWarning), match="deprecated"),
        pytest.raises(GraphRegError, match=r"torch\.jit\.trace would freeze the scheduled strengths of this call"),
    ):
        torch.jit.trace(module, X)  # type: ignore[no-untyped-call]
    with pytest.warns(UserWarning, match=r"exported in train mode, and the program will have the scheduled strengths of this call"):
        torch.export.export(module, (X,))


# kept


def test_states_and_copies() -> None:
    module = graphreg.regularize(perceptron(), hidden_dropout=RATES, weight_l2=WEIGHTS, rng=0)
    module(X)
    graphreg.set_strength(module, "weight_l2", 3.0)
    before = graphreg.rng_state(module)
    for twin in (copy.deepcopy(module), copy.copy(module), pickle.loads(pickle.dumps(module)), copy.deepcopy(module).half().float()):
        assert graphreg.rng_state(twin) == before and graphreg.strengths(twin) == {"hidden_dropout": 0.125, "weight_l2": 3.0}
        twin(X)
        assert clock(twin) == 2 and clock(module) == 1 and graphreg.strengths(twin)["hidden_dropout"] == 0.25
    expected = [module(X).output for _ in range(2)]
    graphreg.set_rng_state(module, before)
    assert all(torch.equal(module(X).output, output) for output in expected)
    averaged = torch.optim.swa_utils.AveragedModel(module, use_buffers=True)
    for _ in range(2):
        module(X)
        averaged.update_parameters(module)
    assert graphreg.strengths(averaged.module) == graphreg.strengths(module) and clock(averaged.module) == clock(module)


def test_old_states_load_and_foreign_ones_do_not() -> None:
    module = graphreg.regularize(perceptron(), hidden_dropout=RATES, rng=0)
    plain = graphreg.regularize(perceptron(), hidden_dropout=0.5, rng=1)
    module(X)
    old = {**graphreg.rng_state(plain), "call": 7}
    assert old["version"] == 1
    graphreg.set_rng_state(module, old)
    assert graphreg.rng_state(module) == {**old, "version": 2, "clock": 1}  # such a state has no clock: it stays
    with pytest.raises(RegularizerError, match=r"the state belongs to another module: it has the clock of schedules, and no"):
        graphreg.set_rng_state(plain, graphreg.rng_state(module))
    for wrong in (-1, 1.5, None, 2**63):
        with pytest.raises(RegularizerError, match=r"the state is damaged: it has clock=.*, not a whole number of 0 or more"):
            graphreg.set_rng_state(module, {**graphreg.rng_state(module), "clock": wrong})
    with pytest.raises(RegularizerError, match=r"the state is damaged: it has clock, which no state has"):
        graphreg.set_rng_state(module, {**old, "clock": 1})


def test_in_place() -> None:
    """All structures share one clock, also where a graph is made later; eval mode runs the model itself."""
    model = graphreg.regularize_(dropping(), **everything(), scale=1.0)
    graphreg.set_strength(model, "weight_l2", 0.7)
    assert clock(model) == 0 and graphreg.strengths(model)["own_dropout"] == pytest.approx(0.6)
    same = graphreg.regularize(dropping(), **everything())
    graphreg.set_strength(same, "weight_l2", 0.7)
    for _ in range(2):
        assert torch.equal(model(X), same(X).output)
    model(torch.randn(2, 5, 4))
    same(X)
    assert torch.equal(model(X), same(X).output) and clock(model) == 4
    assert graphreg.site_strengths(model) == graphreg.site_strengths(same)
    graphreg.set_strength(model, "hidden_l1", {"relu": 0.9})
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert clock(twin) == 4
        twin(X)
        assert graphreg.site_strengths(twin)["hidden_l1"] == {"relu": 0.9} and graphreg.strengths(twin)["weight_l2"] == 0.7
    state = graphreg.rng_state(model)
    model.eval()(X)
    graphreg.sample(model, X, 2)
    assert graphreg.rng_state(model)["clock"] == 4
    other = graphreg.regularize_(dropping(), **everything(), scale=1.0)
    graphreg.set_rng_state(other, state)  # before the first trace
    assert graphreg.strengths(other)["hidden_dropout"] == 0.5 and clock(other) == 4


def test_blocks_in_place() -> None:
    rising = schedules.linear(0.1, 0.5, 4)
    options = {"hidden_dropout": rising, "drop_path": graphreg.by_depth(0, rising), "hidden_l1": rising, "rng": 0}
    module = graphreg.regularize(blocks(), **options)
    placed = graphreg.regularize_(blocks(), **options, blocks="[012]", penalties="return")
    for call in range(3):
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(results(placed), results(module), strict=True))
        for each in (placed, module) if call == 1 else ():
            graphreg.set_strength(each, "hidden_dropout", {"0.*": 0.0})
    assert graphreg.site_strengths(placed) == graphreg.site_strengths(module)


def test_an_assertion_that_fails_in_place_counts_once() -> None:
    class Sized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.lin(x)
            return y.relu() if x.shape[0] > 3 else y.tanh()

    model = graphreg.regularize_(Sized(), weight_l2=schedules.linear(0, 1, 4), scale=1.0)
    for rows in (5, 2, 5):
        model(torch.randn(rows, 4))
    assert clock(model) == 3 and graphreg.strengths(model) == {"weight_l2": 0.75}


def test_backend() -> None:
    torch._dynamo.reset()
    options = {name: value for name, value in everything().items() if name != "own_dropout"}
    backend, model = graphreg.backend(**options, inner="aot_eager"), perceptron()
    compiled, same = torch.compile(model, backend=backend), graphreg.regularize(model, **options)
    for call in range(4):
        output, (expected, penalties) = compiled(X), same(X)
        torch.testing.assert_close(output, expected)
        torch.testing.assert_close(backend.penalties(), dict(penalties))
        assert graphreg.strengths(backend) == pytest.approx(graphreg.strengths(same)) and clock(backend) == call + 1
        for each in (backend, same) if call == 1 else ():
            graphreg.set_strength(each, "weight_l2", 0.25)
    with graphreg.frozen_noise(backend):
        assert torch.equal(compiled(X), compiled(X)) and graphreg.strengths(backend) == pytest.approx(graphreg.strengths(same))
    assert clock(backend) == 5 and len(backend.subgraphs) == 1
    with graphreg.noise_off(backend):
        compiled(X)
    model.eval()
    compiled(X)
    assert clock(backend) == 5 and "hidden_l1: schedule piecewise({0: 0, 2: 2})" in graphreg.report(backend).text(None)
    state = graphreg.rng_state(backend)
    again = graphreg.backend(**options, inner="aot_eager")
    graphreg.set_rng_state(again, state)
    assert graphreg.rng_state(again) == state and state["version"] == 2
    with pytest.raises(RegularizerError, match=r"own_dropout=\{.*\} is not allowed in a backend, where the rates"):
        graphreg.backend(**everything())
    with pytest.raises(RegularizerError, match=r"it has the clock of schedules, and no strength has a schedule here"):
        graphreg.set_rng_state(graphreg.backend(hidden_dropout=0.5, inner="eager"), state)


def test_a_pass_and_a_later_pass() -> None:
    traced = torch.fx.symbolic_trace(perceptron())
    module = graphreg.as_pass(hidden_l1=schedules.linear(0, 1, 4))(traced).graph_module
    later = torch.fx.GraphModule(module, module.graph)
    later.train()
    for call in range(3):
        assert graphreg.strengths(later) == {"hidden_l1": call / 4}
        later(X)
    later.eval()(X)
    assert graphreg.strengths(later) == {"hidden_l1": 0.75}


def test_what_is_shown() -> None:
    module = graphreg.regularize(dropping(), **everything(), example_inputs=X)
    module(X)
    plan = graphreg.plan(graphreg.trace(dropping()), [BernoulliDropout("relu", RATES), DropPath("relu", 0.1)])
    assert "BernoulliDropout dropout  linear(0, 0.5, 4)  relu" in str(plan)
    assert plan.to_dict()["regularizers"]["dropout"]["weight"] == "linear(0, 0.5, 4)"
    text = graphreg.report(module).text(None)
    assert "hidden_dropout: schedule linear(0, 0.5, 4)" in text and "schedules: 1 calls in train mode so far" in text
    assert "seeded at linear(0.6, 0.2, 3), now 0.466667" in text and "\nschedules" in text  # the note, and a row of the costs
    graphreg.set_strength(module, "hidden_dropout", 0.2)
    assert "hidden_dropout: made with the schedule linear(0, 0.5, 4), and set since" in graphreg.report(module).text(None)
    lines = graphreg.diff(module).text()
    assert "# hidden_dropout: BernoulliDropout 0.2 now, linear(0, 0.5, 4), on '*'" in lines
    assert "# schedules of hidden_dropout, drop_connect, weight_l2, hidden_l1, own_dropout" in lines
    logged: dict[str, list[float]] = {}
    with graphreg.monitor(module, "relu", log=lambda name, value, step: logged.setdefault(name, []).append(value)):
        for _ in range(2):
            module(X)
    assert logged["strength/hidden_dropout"] == [0.2, 0.2] and logged["strength/hidden_l1"] == [0.0, 2.0]
    assert logged["strength/own_dropout"] == pytest.approx([0.6 - 0.4 / 3, 0.6 - 0.8 / 3])
    graphreg.verify(dropping(), graphreg.regularize(dropping(), **everything(), example_inputs=X), X)


def test_the_check_finds_a_lost_clock() -> None:
    traced = graphreg.trace(perceptron())
    plan = graphreg.plan(traced, [BernoulliDropout("*", RATES), WeightL2("*", 0.1)])
    for name, change, says in (
        ("relu_dropout", {}, r"relu_dropout does not take the strengths of the call from the clock"),
        ("weight_l2", {"clock": "clock"}, r"weight_l2 does not take the strengths of the call from the clock"),
    ):
        module = graphreg.rewrite(traced, plan, 0)
        nodes = {node.name: node for node in module.graph.nodes}
        nodes[name].kwargs = {key: nodes[value] for key, value in change.items()}
        with pytest.raises(GraphRegError, match=says):
            check(module, traced, plan)


def test_the_clock_counts_although_nothing_reads_it() -> None:
    model = dropping()
    traced = graphreg.trace(model)
    plan = graphreg.plan(traced, [], missing="ignore", own_dropout={"other": RATES})
    module = graphreg.rewrite(traced, plan, 0)
    module(X)
    assert clock(module) == 1 and graphreg.strengths(module) == {"own_dropout": 0.125}
    (node,) = (node for node in module.graph.nodes if node.name == "clock")
    module.graph.eliminate_dead_code()
    assert node in list(module.graph.nodes)
    module.graph.erase_node(node)
    with pytest.raises(GraphRegError, match=r"it does not have one clock for its schedules"):
        check(module, traced, plan)


def test_the_doctor_leaves_the_clock_and_finds_a_checkpoint_around_it() -> None:
    module = graphreg.regularize(perceptron(), hidden_l1=schedules.linear(0, 1, 4))
    compiled = torch.compile(lambda x: sum(module(x).penalties.values()), backend="eager")

    def step() -> None:
        checkpoint(compiled, X.clone().requires_grad_(), use_reentrant=True).sum().backward()

    (finding,) = graphreg.doctor(module, step, backend="eager").findings
    assert finding.observed == "calls in train mode: 1 in the forward, 1 in backward, each with scheduled strengths of its own"
    assert clock(module) == 0 and graphreg.doctor(module, lambda: compiled(X).backward(), backend="eager").ok
    placed = graphreg.regularize_(perceptron(), hidden_l1=schedules.linear(0, 1, 4), scale=1.0, example_inputs=X)
    assert graphreg.doctor(placed, lambda: placed(X).sum().backward(), backend="eager").ok and clock(placed) == 0


def test_drawn_without_its_clock(tmp_path: Path) -> None:
    module = graphreg.regularize(perceptron(), hidden_dropout=RATES, weight_l2=WEIGHTS, rng=0)
    graphreg.draw(module, tmp_path / "net.dot")
    text = (tmp_path / "net.dot").read_text()
    assert "clock" not in text and "hidden_dropout" in text


def test_a_random_order_of_calls() -> None:
    """The clock counts what it should, whatever blocks and modes the calls are in."""
    module, draw, count = graphreg.regularize(perceptron(), hidden_dropout=RATES, rng=0), random.Random(0), 0
    for _ in range(200):
        kind = draw.choice(["train", "eval", "on", "off", "frozen"])
        module.train(kind != "eval")
        blocks = {"on": graphreg.noise_on, "off": graphreg.noise_off, "frozen": graphreg.frozen_noise}
        repeats = draw.randint(0, 3)
        if kind in blocks:
            with blocks[kind](module):
                for _ in range(repeats):
                    module(X)
            count += kind == "frozen" and repeats > 0
        else:
            for _ in range(repeats):
                module(X)
            count += repeats if kind == "train" else 0
        assert clock(module) == count


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, lambda module: pickle.loads(pickle.dumps(module))])
@pytest.mark.parametrize("strength", [0.5, schedules.linear(0.2, 0.5, 10)])
def test_a_copy_that_is_made_while_the_noise_is_frozen_is_not(copied: Callable[[Any], Any], strength: float) -> None:
    """No block would ever end in it. It goes on where the module goes on after the block."""
    module = graphreg.regularize(perceptron(), hidden_dropout=strength, rng=0)
    with graphreg.frozen_noise(module):
        first = module(X).output
        twin = copied(module)
        assert torch.equal(module(X).output, first)
    expected = [module(X).output for _ in range(3)]
    assert all(torch.equal(twin(X).output, each) for each in expected)
    assert not torch.equal(expected[0], expected[1]) and not torch.equal(expected[0], first)


def test_an_average_that_is_updated_while_the_noise_is_frozen_is_not() -> None:
    module = graphreg.regularize(perceptron(), hidden_dropout=0.5, rng=0)
    averaged = torch.optim.swa_utils.AveragedModel(module, use_buffers=True)
    with graphreg.frozen_noise(module):
        module(X)
        averaged.update_parameters(module)
    run = torch.compile(averaged.module, backend="aot_eager", fullgraph=True)
    assert not torch.equal(run(X).output, run(X).output)


def test_compiled_after_inference() -> None:
    """A call under inference_mode makes what the next call needs; compiled, that call must be able to save it for backward."""
    module = graphreg.regularize(perceptron(), hidden_dropout=RATES, rng=0)
    run = torch.compile(module, backend="aot_eager", fullgraph=True)
    with torch.inference_mode():
        module(X)
        run(X)
    run(X).output.sum().backward()
    assert clock(module) == 3


def test_copies_in_place_have_room_for_the_longest_schedule() -> None:
    pieces = schedules.piecewise({0: 0.1, 2: 0.2, 3: 0.3})
    model = nn.Sequential(nn.Dropout(0.1), nn.Linear(4, 4), nn.Dropout(0.1))
    graphreg.regularize_(model, own_dropout={"0": schedules.linear(0, 0.9, 10), "2": pieces}, rng=0, example_inputs=X)
    graphreg.set_strength(model, "own_dropout", pieces)
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for _ in range(4):
        y = model(X)
        assert all(torch.equal(twin(X), y) for twin in twins)


def test_an_average_has_the_strengths_that_were_set_by_site() -> None:
    """Its splices read them, also within blocks that were made with equal strengths, and its recipe has them."""
    torch.manual_seed(0)
    blocks = nn.Sequential(Block(), Block())
    module = graphreg.regularize(blocks, dropout={"*.relu": 0.1}, rng=0, blocks="[01]")
    averaged = torch.optim.swa_utils.AveragedModel(module, use_buffers=True)
    graphreg.set_strength(module, "dropout", {"0.relu": 0.9})
    averaged.update_parameters(module)
    assert graphreg.site_strengths(averaged.module) == graphreg.site_strengths(module) == {"dropout": {"0.relu": 0.9, "1.relu": 0.1}}
    assert graphreg.recipe(averaged.module) == graphreg.recipe(module)
    assert torch.equal(averaged.module(X).output, module(X).output)


def test_its_text_has_every_digit_and_no_call_is_before_the_first() -> None:
    assert repr(schedules.linear(0, 0.12345678, 10)) == "linear(0, 0.12345678, 10)"
    with pytest.raises(RegularizerError, match=r"the call -1 of linear\(0, 0\.5, 4\) does not exist; calls are numbered from 0\."):
        RATES.at(-1)


@pytest.mark.parametrize("pairs", [[[0, 0.1], [0, 0.2]], [[[0], 0.1]], [["0", 0.1]], [[0, 0.1], [-1, 0.2]]])
def test_pairs_of_a_recipe_that_are_no_schedule(pairs: Any) -> None:
    with pytest.raises(RegularizerError, match=r"each step is a whole number, 0 or more, and occurs once\."):
        schedules.of_plain({"piecewise": pairs})
