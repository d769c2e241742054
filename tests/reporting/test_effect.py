"""``graphreg.effect``: beside numbers worked out by hand, and beside the same measurement with public functions alone."""

from __future__ import annotations

import contextlib
import copy
import io
import math
import sys
import unittest.mock
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import graphreg
from graphreg import GraphRegError, RegularizerError, schedules
from graphreg.passes import L0Gates
from lacking import needs_result

X = torch.randn(7, 4, generator=torch.Generator().manual_seed(1))
Y = torch.randn(7, 2, generator=torch.Generator().manual_seed(2))
OPTIONS: dict[str, Any] = {"hidden_dropout": 0.3, "noise": {"0": 0.2}, "weight_l2": {"weight": 0.1, "reduction": "sum"}, "hidden_l1": 0.2}
FIELDS = ("strength", "adds", "pull", "jitter", "output")


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))


def mse(output: Tensor) -> Tensor:
    return F.mse_loss(output, Y)


def numbers(effects: graphreg.Effects) -> dict[tuple[str, str], tuple[float, ...]]:
    return {(row.name, row.site): tuple(math.nan if (n := getattr(row, f)) is None else n for f in FIELDS) for row in effects}


def assert_alike(ours: graphreg.Effects, theirs: dict[tuple[str, str], tuple[float, ...]], rel: float = 2e-5) -> None:
    assert numbers(ours).keys() == theirs.keys()
    for row, expected in theirs.items():
        assert numbers(ours)[row] == pytest.approx(expected, rel=rel, abs=1e-7, nan_ok=True), row


class Line(nn.Module):
    """w · x, with w = (3, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[3.0, 4.0]]))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


def test_the_pull_of_a_penalty_by_hand() -> None:
    """At x = (1, 2), y = 1: the loss is (11 - 1)² / 2 = 50, its gradient 10 (1, 2); that of 0.1 w² is 0.2 (3, 4), of norm 1."""
    x = torch.tensor([[1.0, 2.0]])
    module = graphreg.regularize(Line(), weight_l2={"weight": 0.1, "reduction": "sum"})
    effects = graphreg.effect(module, lambda out: (out - 1).square().sum() / 2, x, draws=1)
    (row,) = effects
    assert (effects.loss, effects.gradient) == pytest.approx((50, 10 * 5**0.5))
    assert (row.name, row.site, row.strength, row.jitter, row.output) == ("weight_l2", "", 0.1, None, None)
    assert (row.adds, row.pull) == pytest.approx((2.5, 1 / (10 * 5**0.5)))


@pytest.mark.parametrize(("options", "variance"), [({"input_noise": 0.5}, 0.25 * 25), ({"input_dropout": 0.2}, 0.25 * (9 + 64))])
def test_what_a_splice_adds_is_its_expectation(options: dict[str, float], variance: float) -> None:
    """Noise of variance s² on x adds s² w² to a squared error; dropout adds p / (1 - p) times the sum of w² x²."""
    rows = 40_000
    module = graphreg.regularize(Line(), **options, rng=0)
    (row,) = graphreg.effect(module, lambda out: (out - 1).square().mean(), torch.tensor([[1.0, 2.0]]).repeat(rows, 1))
    pulls = torch.tensor([3.0, 4.0]) * (0.5 if "input_noise" in options else 0.5 * torch.tensor([1.0, 4.0]))
    assert row.adds == pytest.approx(variance, rel=0.02)
    assert row.pull == pytest.approx(float(pulls.norm()) / (20 * 5**0.5), rel=0.05)
    assert row.output == pytest.approx(variance**0.5 / 11, rel=0.01)


def by_hand(module: Any, draws: int) -> dict[tuple[str, str], tuple[float, ...]]:
    """The rows of ``effect``, measured with ``set_strength`` and ``set_rng_state`` in a loop."""
    start, strengths, parameters = graphreg.rng_state(module), graphreg.strengths(module), list(module.parameters())

    def gradient(draw: int, off: tuple[str, ...], penalty: str = "") -> tuple[Tensor, Tensor, Tensor]:
        twin = copy.deepcopy(module)
        for name in off:
            graphreg.set_strength(twin, name, 0)
        graphreg.set_rng_state(twin, {**start, "call": start["call"] + draw})
        output, penalties = twin(X)
        value = penalties[penalty] if penalty else mse(output)
        found = torch.autograd.grad(value, list(twin.parameters()), allow_unused=True)
        flat = torch.cat([torch.zeros_like(p).flatten() if g is None else g.flatten() for g, p in zip(found, parameters, strict=True)])
        reached = torch.cat([torch.full_like(p, g is not None).flatten() for g, p in zip(found, parameters, strict=True)])
        return value.detach(), torch.stack([flat, reached]), output.detach()

    found = {}
    splices = ("hidden_dropout", "noise")
    plain = torch.stack([gradient(draw, splices)[1][0] for draw in range(draws)]).mean(0)
    for name in strengths:
        if name in splices:
            pairs = [(gradient(draw, ()), gradient(draw, (name,))) for draw in range(draws)]
            values = [a[0] - b[0] for a, b in pairs]
            differences = torch.stack([a[1][0] - b[1][0] for a, b in pairs])
            reached = torch.ones_like(plain)
            change = torch.stack([a[2] - b[2] for a, b in pairs])
            output = float(change.norm() / torch.stack([b[2] for _, b in pairs]).norm())
        else:
            each = [gradient(draw, (), name) for draw in range(draws)]
            values, differences, reached, output = [v[0] for v in each], torch.stack([v[1][0] for v in each]), each[0][1][1], math.nan
        variance, below = differences.var(0).sum(), (plain * reached).norm()
        pull = (differences.mean(0).square().sum() - variance / draws).clamp(min=0).sqrt() / below
        jitter = float(variance.sqrt() / below) if name in splices else math.nan
        found[name, ""] = strengths[name], float(torch.stack(values).mean()), float(pull), jitter, output
    return found


def hosts() -> dict[str, Callable[[], Any]]:
    def by_backend() -> Any:
        torch._dynamo.reset()
        return torch.compile(net(), backend=graphreg.backend(inner="aot_eager", **OPTIONS, rng=0))

    def compiled() -> Any:
        module = graphreg.regularize(net(), **OPTIONS, rng=0)
        module.compile(backend="eager")
        return module

    return {
        "module": lambda: graphreg.regularize(net(), **OPTIONS, rng=0),
        "attach": lambda: graphreg.regularize(net(), **OPTIONS, rng=0, penalties="attach", scale=8.0),
        "blocks": lambda: graphreg.regularize(net(), **OPTIONS, rng=0, blocks="[03]"),
        "compiled": compiled,
        "in place": lambda: graphreg.regularize_(net(), **OPTIONS, rng=0, scale=8.0),
        "backend": by_backend,
        "backend, attach": lambda: torch.compile(
            net(), backend=graphreg.backend(inner="eager", **OPTIONS, rng=0, penalties="attach", scale=8.0)
        ),
    }


def state_of(module: Any) -> dict[str, Any]:
    last: dict[str, Tensor] = {}
    host = graphreg.backend_of(module) if hasattr(module, "_orig_mod") else module
    model = getattr(module, "_orig_mod", module)
    with contextlib.suppress(GraphRegError):  # a module may return its penalties
        last = host.penalties()
    return {
        "state": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "buffers": {name: id(buffer) for name, buffer in model.named_buffers() if "graphreg_rules" not in name},
        "gradients": [parameter.grad for parameter in model.parameters()], "modes": [each.training for each in model.modules()],
        "noise": graphreg.rng_state(module), "strengths": graphreg.site_strengths(module), "recipe": graphreg.recipe(module),
        "last": {name: float(value.detach()) for name, value in last.items()}, "torch": torch.get_rng_state(),
    }  # fmt: skip


def assert_unchanged(before: dict[str, Any], after: dict[str, Any]) -> None:
    torch.testing.assert_close(after.pop("state"), before.pop("state"), rtol=0, atol=0)
    assert torch.equal(after.pop("torch"), before.pop("torch"))
    assert all(a is b for a, b in zip(after.pop("gradients"), before.pop("gradients"), strict=True))
    assert after == before


@pytest.mark.parametrize("name", [pytest.param(name, marks=needs_result if name == "backend, attach" else ()) for name in hosts()])
def test_every_host_gives_what_a_loop_by_hand_gives_also_by_site_and_changes_nothing(name: str) -> None:
    module = hosts()[name]()
    module(X)
    expected = graphreg.regularize(net(), **OPTIONS, rng=0)
    expected(X)
    for mode in (True, False):
        module.train(mode)
        before = state_of(module)
        effects = graphreg.effect(module, mse, X, draws=2)
        assert_unchanged(before, state_of(module))
        if mode:
            assert_alike(effects, by_hand(expected, 2))
            first = numbers(effects)
    assert_alike(effects, first, rel=1e-6)  # a model in eval mode is measured as in training
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        rough = graphreg.effect(module, mse, X, draws=2)
    assert next(iter(rough)).adds == pytest.approx(next(iter(effects)).adds, rel=0.3) and numbers(rough) != numbers(effects)
    if name in ("module", "blocks", "in place", "backend"):
        before = state_of(module)
        at_sites = graphreg.effect(module, mse, X, draws=2, by_site=True)
        assert_unchanged(before, state_of(module))
        assert_by_site(module, at_sites, effects)
        if name != "backend":  # a module reads the elements that it read before, so nothing is compiled again
            assert [*graphreg.effect(module, mse, X, draws=2)] == [*effects]


def assert_by_site(module: Any, at_sites: graphreg.Effects, whole: graphreg.Effects) -> None:
    sites = {(row.name, row.site) for row in at_sites}
    assert sites == {(name, site) for name, found in graphreg.site_strengths(module).items() for site in found}
    for row in whole:
        if row.output is None:  # the parts of a penalty are the penalty
            assert sum(part.adds for part in at_sites if part.name == row.name) == pytest.approx(row.adds, rel=1e-5)
    (noise,) = (row for row in at_sites if row.name == "noise")
    assert numbers(whole)["noise", ""] == pytest.approx(numbers(at_sites)["noise", noise.site], rel=1e-5)


def test_in_a_process_group() -> None:
    """DistributedDataParallel is looked through, so that no rank waits for another; sharded parameters are refused."""
    hook = sys.excepthook  # which a process group puts its own around
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    try:
        module = graphreg.regularize(net(), **OPTIONS, rng=0)
        expected = numbers(graphreg.effect(module, mse, X, draws=2))
        wrapped = DistributedDataParallel(module)
        with unittest.mock.patch.object(DistributedDataParallel, "forward", side_effect=AssertionError):
            assert_alike(graphreg.effect(wrapped, mse, X, draws=2), expected)
        assert all(parameter.grad is None for parameter in module.parameters())
        sharded = fully_shard(graphreg.regularize(net(), **OPTIONS, rng=0), mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(GraphRegError, match="the parameters are sharded"):
            graphreg.effect(sharded, mse, X)
    finally:
        dist.destroy_process_group()
        sys.excepthook = hook


@pytest.mark.parametrize(("make", "more"), [(graphreg.regularize, {}), (graphreg.regularize_, {"penalties": "attach", "scale": 1})])
def test_a_penalty_that_acts_by_prox_is_measured_as_its_twin(make: Callable[..., Any], more: dict[str, Any]) -> None:
    found = []
    for by in ("prox", "gradient"):
        module = make(net(), weight_l1={"weight": schedules.linear(0.1, 0.5, 4), "by": by}, hidden_dropout=0.2, rng=0, **more)
        module(X)
        found += [numbers(graphreg.effect(module, mse, X, draws=2, by_site=by_site)) for by_site in (False, True)]
    for prox, gradient in zip(found[:2], found[2:], strict=True):
        assert prox.keys() == gradient.keys() and len(prox) in (2, 5)
        for row, expected in gradient.items():
            assert prox[row] == pytest.approx(expected, rel=1e-5, nan_ok=True), row


def test_a_schedule_has_its_present_strength_in_all_draws() -> None:
    module = graphreg.regularize(net(), hidden_dropout=schedules.linear(0, 0.5, 4), hidden_l1=0.1, rng=0)
    module(X), module(X)
    before = state_of(module)
    scheduled = graphreg.effect(module, mse, X, draws=4)
    assert_unchanged(before, state_of(module))
    constant = graphreg.regularize(net(), hidden_dropout=0.25, hidden_l1=0.1, rng=0)
    constant(X), constant(X)
    assert_alike(scheduled, numbers(graphreg.effect(constant, mse, X, draws=4)))
    assert scheduled[0].strength == 0.25


def test_a_splice_that_learns_is_measured_with_its_penalty() -> None:
    """Its strength is that of the penalty. It acts at strength 0, too, so without it there is its form for eval mode."""
    module = graphreg.regularize(net(), [L0Gates("2", 0.5)], example_inputs=X, rng=0)
    (row,) = graphreg.effect(module, mse, X)
    state = graphreg.rng_state(module)
    with_it = []
    for draw in range(8):
        graphreg.set_rng_state(module, {**state, "call": draw})
        with_it.append(mse(module(X).output).item())
    graphreg.set_rng_state(module, state)
    with graphreg.noise_off(module):
        without = mse(module(X).output).item()
    penalty = module(X).penalties["l0_gates"].item()
    assert row.adds == pytest.approx(sum(with_it) / 8 - without + penalty, rel=1e-4)
    assert row.pull > 0 and row.output is not None


def test_native_dropout_acts_alike_in_all_passes_and_only_reached_parameters_count() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.drop = nn.Linear(4, 2), nn.Linear(4, 2), nn.Dropout(0.5)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.one(self.drop(x)), self.two(x)

    module = graphreg.regularize(Two(), noise={"two": 0.0}, weight_l2={"weight": 0.1, "pattern": "one.weight"}, rng=0)
    noise, penalty = graphreg.effect(module, lambda out: mse(out[0]) + mse(out[1]), X)
    assert (noise.adds, noise.pull, noise.jitter, noise.output) == (0, 0, 0, 0)
    generator = torch.get_rng_state()
    total = torch.zeros(2, 4)
    for draw in range(8):
        torch.manual_seed(draw)
        total += torch.autograd.grad(mse(module(X).output[0]), module.get_parameter("one.weight"))[0] / 8
    torch.set_rng_state(generator)
    assert penalty.pull == pytest.approx(float(0.2 * module.get_parameter("one.weight").detach().norm() / 8 / total.norm()), rel=1e-4)


def test_what_prints() -> None:
    module = graphreg.regularize(Line(), weight_l2={"weight": 0.1, "reduction": "sum"}, input_noise=0.5, rng=0)
    effects = graphreg.effect(module, lambda out: (out - 1).square().sum() / 2, torch.tensor([[1.0, 2.0]]), draws=1)
    assert str(effects).splitlines()[:2] == [
        "Line: loss 50 without regularizers, its gradient 22.4; 1 draw", "name         strength  adds  pull   0.001 to 1    output",
    ]  # fmt: skip
    assert "weight_l2    0.1       2.5   0.045  #######" in str(effects).splitlines()
    assert effects._repr_html_().count("<tr>") == 3 and "#######" in effects._repr_html_()
    assert effects.to_dict()["rows"][0]["name"] == effects[0].name and len(effects) == 2 == len(effects[:])


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_shown_on_a_terminal_alone(terminal: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    module = graphreg.regularize(net(), **OPTIONS, rng=0)
    stream = io.StringIO()
    stream.isatty = lambda: terminal  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stderr", stream)
    graphreg.effect(module, mse, X, draws=2)
    # 2 with all, 2 without any, 2 for each splice and the penalty on values, 1 for that on parameters
    assert (stream.getvalue().startswith("\rgraphreg.effect: 0 of 11 passes") and stream.getvalue().endswith("\x1b[K")) == terminal
    assert terminal or not stream.getvalue()


def test_a_vanished_gradient_is_told() -> None:
    module = graphreg.regularize(Line(), weight_l2=0.1)
    with pytest.warns(UserWarning, match=r"gradient of the loss has nearly vanished: its norm is .*, and weight_l2 pulls"):
        graphreg.effect(module, lambda out: (out - 11).square().mean() + 1e-4 * out.mean(), torch.tensor([[1.0, 2.0]]))


def test_bad_input_is_refused_and_changes_nothing() -> None:
    module, backend = graphreg.regularize(net(), hidden_dropout=0.2, rng=0), graphreg.backend(hidden_l1=0.1)
    before = state_of(module)
    for message, call in {
        r"loss=0\.5 is not allowed": lambda: graphreg.effect(module, 0.5, X),  # type: ignore[arg-type]
        r"draws=0 is not allowed": lambda: graphreg.effect(module, mse, X, draws=0),
        r"loss gave a tensor \[7, 2\] of torch\.float32": lambda: graphreg.effect(module, lambda out: out, X),
        r"loss gave 1\.0": lambda: graphreg.effect(module, lambda out: 1.0, X),  # type: ignore[arg-type,return-value]
        r"the loss has no gradient": lambda: graphreg.effect(module, lambda out: out.detach().sum(), X),
        r"the loss is nan": lambda: graphreg.effect(module, lambda out: out.sum() * math.nan, X),
    }.items():
        with pytest.raises(RegularizerError, match=message):
            call()
    assert_unchanged(before, state_of(module))
    for block in (graphreg.frozen_noise, graphreg.noise_off, graphreg.noise_on, graphreg.penalties_off):
        with block(module), pytest.raises(GraphRegError, match="outside of blocks of frozen_noise"):
            graphreg.effect(module, mse, X)
    for message, target in {
        "give it what torch.compile returned": backend, "no graph yet|was not called yet": torch.compile(net(), backend=backend),
        "is not a module that graphreg rewrote": net(), "has no graph yet": graphreg.regularize_(net(), hidden_dropout=0.1),
        "has no regularizer whose effect": graphreg.regularize(net()),
    }.items():  # fmt: skip
        with pytest.raises(GraphRegError, match=message):
            graphreg.effect(target, mse, X)


def test_an_error_of_the_loss_leaves_nothing_behind() -> None:
    module, calls = graphreg.regularize(net(), **OPTIONS, rng=0, penalties="attach", scale=1), []

    def fails(output: Tensor) -> Tensor:
        calls.append(output)
        return mse(output) if len(calls) < 4 else mse(output[:3])

    module(X)
    before = state_of(module)
    with contextlib.suppress(RuntimeError), pytest.warns(UserWarning, match="target size"):
        graphreg.effect(module, fails, X)
    assert len(calls) == 4
    assert_unchanged(before, state_of(module))


class Writes(nn.Module):
    """Its forward writes into a parameter and into buffers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.out, self.norm = nn.Embedding(5, 4, max_norm=0.5), nn.Linear(4, 2), nn.BatchNorm1d(2)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, ids: Tensor) -> Tensor:
        self.seen.add_(1)
        return self.norm(self.out(self.table(ids)) + self.seen)


def test_what_a_forward_writes_is_put_back_before_each_pass() -> None:
    """So a splice that does nothing has no effect; nor has an open monitor seen the passes, nor a pending backward."""
    model = Writes()
    module, ids = graphreg.regularize(model, dropout={"table": 0.0, "out": 0.0}, rng=0), torch.tensor([0, 1, 4, 2, 2, 3, 1])
    with graphreg.monitor(module, "table") as watched:
        pending = mse(module(ids).output)
        before, calls = {name: value.clone() for name, value in module.state_dict().items()}, watched.calls
        rows = graphreg.effect(module, mse, ids, draws=3)
        assert [(row.pull, row.jitter, row.adds) for row in rows] == [(0, 0, 0)] * 2
        assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
        assert watched.calls == calls == 1
        pending.backward()
