"""Noise held still, ranks told apart or alike, states refused, many passes sampled."""

from __future__ import annotations

import copy
import io
import json
import logging
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.gradcheck import GradcheckError

import graphreg
from graphreg import GraphRegError, RegularizerError
from graphreg.passes import BernoulliDropout, GaussianNoise
from graphreg.rng.noise import ranked

X = torch.linspace(-1, 1, 48).view(6, 8)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm, self.own = nn.Linear(8, 16), nn.Linear(16, 3), nn.BatchNorm1d(16), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.own(torch.tanh(self.norm(self.a(x)))))


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))


def noisy(kind: type[nn.Module] = Plain, **options: Any) -> Any:
    torch.manual_seed(0)
    return graphreg.regularize(kind(), BernoulliDropout("tanh", 0.5), GaussianNoise("a", 0.3), rng=options.pop("rng", 7), **options)


def draw(module: Callable[..., Any], x: Tensor = X) -> Tensor:
    output: Tensor = module(x).output
    return output


# ---- frozen_noise


def test_a_block_draws_the_next_masks_and_counts_as_one_call() -> None:
    module = noisy()
    first, second, third = _three(module)
    assert torch.equal(draw(module), first)
    with graphreg.frozen_noise(module):
        assert all(torch.equal(draw(module), second) for _ in range(4))
    assert graphreg.rng_state(module)["call"] == 2
    assert torch.equal(draw(module), third)


@pytest.mark.parametrize("transform", [torch.func.grad, lambda f: lambda x: torch.func.jvp(f, (x,), (x,))])
def test_a_block_within_a_transform(transform: Callable[..., Any]) -> None:
    """What the block leaves behind outlasts the transform."""
    module, plain = noisy(), noisy()
    first, second, third = _three(plain)

    def frozen(x: Tensor) -> Tensor:
        with graphreg.frozen_noise(module):
            return draw(module, x).sum()

    for _ in (first, second):
        transform(frozen)(X)
    assert torch.equal(draw(module), third)


def test_a_dropout_that_torch_draws_is_told_of_once(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(logging.getLogger("graphreg"), "warning", lambda text, *args: told.append(text % args))
    module = graphreg.regularize(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Dropout(0.2), nn.Linear(4, 2)), hidden_noise=0.1)
    for training in (False, True, True):
        module.train(training)
        with graphreg.frozen_noise(module):
            module(torch.ones(2, 4))
    with graphreg.frozen_noise(noisy()):
        pass
    apart = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Dropout(0.2), nn.Linear(4, 2))
    for root, own in ((True, False), (False, True)):  # it is the mode of the dropout that counts
        module = graphreg.regularize(apart, hidden_noise=0.1).train(root)
        apart[2].train(own)
        with graphreg.frozen_noise(module):
            assert len(told) == 1 + own
    del told[1]
    assert told == ["frozen_noise does not freeze 2: torch draws it, not graphreg. With own_dropout='seeded', graphreg draws what it can."]


def _three(module: nn.Module) -> list[Tensor]:
    twin = copy.deepcopy(module)
    return [draw(twin) for _ in range(3)]


def test_a_block_in_which_nothing_is_drawn_counts_as_none() -> None:
    module = noisy()
    first = _three(module)[0]
    with graphreg.frozen_noise(module):
        pass
    with graphreg.frozen_noise(module):
        module.eval()(X)
    assert graphreg.rng_state(module)["call"] == 0
    assert torch.equal(draw(module.train()), first)


def test_a_block_in_a_block_is_part_of_it() -> None:
    module = noisy()
    first, second, _ = _three(module)
    with graphreg.frozen_noise(module):
        with graphreg.frozen_noise(module):
            assert torch.equal(draw(module), first)
        assert torch.equal(draw(module), first)
    assert torch.equal(draw(module), second)


def test_a_block_that_raises_lets_go() -> None:
    module = noisy()
    _, second, _ = _three(module)
    with pytest.raises(ZeroDivisionError), graphreg.frozen_noise(module):
        draw(module)
        raise ZeroDivisionError
    assert torch.equal(draw(module), second)


def test_the_state_within_a_block() -> None:
    """Saved behind a call of the block it is the state behind the block; set, the block goes on with that call's masks."""
    module = noisy()
    first, second, third = _three(module)
    with graphreg.frozen_noise(module):
        assert graphreg.rng_state(module)["call"] == 0
        draw(module)
        draw(module)
        state = graphreg.rng_state(module)
        assert state["call"] == 1
        graphreg.set_rng_state(module, {**state, "call": 1})
        assert torch.equal(draw(module), second) and torch.equal(draw(module), second)
    assert torch.equal(draw(module), third)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("way", ["torch.compile", "module.compile"])
def test_compiled_blocks(backend: str, way: str) -> None:
    """The same masks as eager in and out of blocks, and one compilation for all of them."""
    module, twin = noisy(), noisy()
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    run: Any = torch.compile(module, fullgraph=True, backend=counter) if way == "torch.compile" else module
    if way == "module.compile":
        module.compile(fullgraph=True, backend=counter)
    for held in (False, True, True, False, True):
        if held:
            with graphreg.frozen_noise(run), graphreg.frozen_noise(twin):
                outputs = [(draw(run), draw(twin)) for _ in range(3)]
            assert torch.equal(outputs[0][0], outputs[2][0])
        else:
            outputs = [(draw(run), draw(twin)) for _ in range(2)]
            assert not torch.equal(outputs[0][0], outputs[1][0])
        for ours, theirs in outputs:
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        assert graphreg.rng_state(run) == graphreg.rng_state(twin)
    assert graphreg.rng_state(run)["call"] == 7
    assert counter.frame_count == 1


def test_gradcheck() -> None:
    """Finite differences need the same function at every call."""
    module = noisy().double()
    x = torch.randn(2, 8, dtype=torch.double, requires_grad=True)

    def function(x: Tensor, *parameters: Tensor) -> Tensor:
        return draw(module, x)

    with graphreg.frozen_noise(module):
        assert torch.autograd.gradcheck(function, (x, module.a.bias, module.b.weight))
    with pytest.raises(GradcheckError):
        torch.autograd.gradcheck(function, (x, module.a.bias, module.b.weight))


def test_checkpointing_around_the_whole_module() -> None:
    """Backward runs the forward again: refused, unless both are in one block, where the gradient is the plain one."""
    module, twin = noisy(), noisy()
    x = X.clone().requires_grad_()
    loss = torch.utils.checkpoint.checkpoint(draw, module, x, use_reentrant=False).square().sum()
    with pytest.raises(GraphRegError, match="frozen_noise"):
        loss.backward()
    graphreg.set_rng_state(module, graphreg.rng_state(twin))
    with graphreg.frozen_noise(module):
        torch.utils.checkpoint.checkpoint(draw, module, x, use_reentrant=False).square().sum().backward()
    draw(twin).square().sum().backward()
    assert graphreg.rng_state(module) == graphreg.rng_state(twin)
    for ours, theirs in zip(module.parameters(), twin.parameters(), strict=True):
        assert theirs.grad is not None and ours.grad is not None
        torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("way", ["torch.compile", "module.compile"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_around_a_compiled_module(reentrant: bool, way: str) -> None:
    """As in eager: refused outside of a block, though the compiled forward cannot know that backward runs it, and right inside."""
    module, twin = noisy(), noisy()
    run: Any = torch.compile(module, fullgraph=True, backend="aot_eager") if way == "torch.compile" else module
    if way == "module.compile":
        module.compile(fullgraph=True, backend="aot_eager")

    def step() -> None:
        torch.utils.checkpoint.checkpoint(draw, run, X.clone().requires_grad_(), use_reentrant=reentrant).square().sum().backward()

    with pytest.raises(GraphRegError, match="frozen_noise"):
        step()
    module.zero_grad()
    graphreg.set_rng_state(module, graphreg.rng_state(twin))
    with graphreg.frozen_noise(module):
        step()
    draw(twin).square().sum().backward()
    assert graphreg.rng_state(module) == graphreg.rng_state(twin)
    for ours, theirs in zip(module.parameters(), twin.parameters(), strict=True):
        assert ours.grad is not None and theirs.grad is not None
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_checkpointing_around_a_compiled_module_that_draws_nothing() -> None:
    module = noisy().eval()
    run = torch.compile(module, fullgraph=True, backend="aot_eager")
    x, y = X.clone().requires_grad_(), X.clone().requires_grad_()
    torch.utils.checkpoint.checkpoint(draw, run, x, use_reentrant=False).square().sum().backward()
    draw(module, y).square().sum().backward()
    assert x.grad is not None and y.grad is not None
    torch.testing.assert_close(x.grad, y.grad)


class Bigger(nn.Module):
    """A model of the user's that checkpoints a rewritten layer in its forward."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = torch.utils.checkpoint.checkpoint(draw, self.layer, x, use_reentrant=False)
        return output


def test_a_checkpointed_layer_of_a_compiled_model() -> None:
    """torch refuses what the layer assigns, its step (2.10 names no setting); with the setting, masks are right."""
    module, twin = noisy(), noisy()
    run = torch.compile(Bigger(module), fullgraph=True, backend="aot_eager")
    with pytest.raises(
        torch._dynamo.exc.Unsupported, match="skip_fwd_side_effects_in_bwd_under_checkpoint|Mutating a variable not in the current scope"
    ):
        run(X)
    with torch._dynamo.config.patch(skip_fwd_side_effects_in_bwd_under_checkpoint=True):
        for _ in range(2):
            run(X).square().sum().backward()
            draw(twin).square().sum().backward()
    assert graphreg.rng_state(module) == graphreg.rng_state(twin)
    for ours, theirs in zip(module.parameters(), twin.parameters(), strict=True):
        assert ours.grad is not None and theirs.grad is not None
        torch.testing.assert_close(ours.grad, theirs.grad)


# ---- modules without noise, and foreign ones


USES: dict[str, Callable[[nn.Module], Any]] = {
    "set_ranks": lambda m: graphreg.set_ranks(m, "same"),
    "sample": lambda m: graphreg.sample(m, X, 2),
    "noise_on": lambda m: graphreg.noise_on(m).__enter__(),
    "frozen_noise": lambda m: graphreg.frozen_noise(m).__enter__(),
    "rng_state": graphreg.rng_state,
    "set_rng_state": lambda m: graphreg.set_rng_state(m, graphreg.rng_state(noisy())),
}


@pytest.mark.parametrize("use", ["set_ranks", "sample", "noise_on"])
def test_a_module_without_noise(use: str) -> None:
    with pytest.raises(GraphRegError, match=re.escape("this module draws no noise: it has no splice")) as told:
        USES[use](graphreg.regularize(Plain(), weight_l2=0.1))
    assert "hidden_dropout=0.1" in str(told.value)


@pytest.mark.parametrize("use", USES)
def test_a_foreign_module(use: str) -> None:
    with pytest.raises(GraphRegError, match="Plain is not a module that graphreg rewrote"):
        USES[use](Plain())


def test_a_loop_for_all_modules_holds_and_resumes_one_without_noise() -> None:
    module, other = (graphreg.regularize(Plain(), weight_l2=0.1) for _ in range(2))
    with graphreg.frozen_noise(module), graphreg.frozen_noise(module):
        held = draw(module)
    state = graphreg.rng_state(module)
    assert state == {"version": 1, "call": 0, "ranks": "differ", "streams": {}}
    graphreg.set_rng_state(other, state)
    assert torch.equal(draw(module), held)


def test_the_states_of_modules_with_and_without_noise_are_not_each_others() -> None:
    quiet, loud = graphreg.regularize(Plain(), weight_l2=0.1), noisy()
    with pytest.raises(RegularizerError, match="belongs to another module, with other streams of noise; only the state has: "):
        graphreg.set_rng_state(quiet, graphreg.rng_state(loud))
    with pytest.raises(RegularizerError, match="belongs to another module, with other streams of noise; the state lacks: "):
        graphreg.set_rng_state(loud, graphreg.rng_state(quiet))
    with pytest.raises(RegularizerError, match="NoneType is no state of noise"):
        graphreg.set_rng_state(quiet, None)  # type: ignore[arg-type]


def test_a_dropout_that_torch_draws_is_told_of_without_noise_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(logging.getLogger("graphreg"), "warning", lambda text, *args: told.append(text % args))
    module = graphreg.regularize(Net(), weight_l2=0.1)
    for _ in range(2):
        with graphreg.frozen_noise(module):
            pass
    assert [text.partition(":")[0] for text in told] == ["frozen_noise does not freeze own"]


# ---- rng=, states, ranks


@pytest.mark.parametrize("rng", [1.0, "0", True, [1], torch.tensor(3)])
def test_a_seed_of_a_wrong_kind(rng: Any) -> None:
    with pytest.raises(RegularizerError, match="give an int, a torch.Generator, or None"):
        noisy(rng=rng)


def test_seeds_of_any_size() -> None:
    outputs = [draw(noisy(rng=rng)) for rng in (0, -1, 1 << 80, -(1 << 80))]
    assert all(not torch.equal(a, b) for i, a in enumerate(outputs) for b in outputs[:i])


DAMAGED: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no dict": (lambda s: [s], "list is no state of noise. Give the dict that graphreg.rng_state returned."),
    "torch's": (lambda s: torch.get_rng_state(), "Tensor is no state of noise"),
    "empty": (lambda s: {}, "the state has no version; this graphreg reads versions 1 and 2. Give the dict that graphreg.rng_state"),
    "another version": (lambda s: {**s, "version": 3}, "the state has version 3; this graphreg reads versions 1 and 2."),
    "no call": (lambda s: {k: v for k, v in s.items() if k != "call"}, "call=None, not a whole number of 0 or more"),
    "a fraction": (lambda s: {**s, "call": 0.5}, "call=0.5, not a whole"),
    "below 0": (lambda s: {**s, "call": -1}, "call=-1, not a whole"),
    "true": (lambda s: {**s, "call": True}, "call=True, not a whole"),
    "too large": (lambda s: {**s, "call": 1 << 63}, "not a whole number of 0 or more (below 2**63)"),
    "ranks": (lambda s: {**s, "ranks": "some"}, "ranks='some', not 'differ' or 'same'"),
    "no streams": (lambda s: {**s, "streams": None}, "streams=None, not a dict of names to 64-bit numbers"),
    "a list": (lambda s: {**s, "streams": list(s["streams"].values())}, "not a dict of names"),
    "a text": (lambda s: {**s, "streams": dict.fromkeys(s["streams"], "7")}, "not a dict of names"),
    "a word too long": (lambda s: {**s, "streams": dict.fromkeys(s["streams"], 1 << 63)}, "not a dict of names"),
    "a foreign key": (lambda s: {**s, "seed": 3}, "the state is damaged: it has seed, which no state has"),
    "a backend's": (lambda s: graphreg.rng_state(graphreg.backend(hidden_dropout=0.1, rng=0)), "the state of a backend's noise is no"),
    "one less": (
        lambda s: {**s, "streams": dict(list(s["streams"].items())[1:])},
        "the state belongs to another module, with other streams of noise; the state lacks: {first}. Build the module as for the run "
        "that saved it",
    ),
    "others": (
        lambda s: {**s, "streams": {f"s{i}": 0 for i in range(5)}},
        "with other streams of noise; only the state has: s0, s1, s2 and 2 more; the state lacks: {first}, ",
    ),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_state_is_refused_and_the_noise_stays(damage: str) -> None:
    module = noisy()
    draw(module)
    before = graphreg.rng_state(module)
    change, sentence = DAMAGED[damage]
    sentence = sentence.replace("{first}", next(iter(before["streams"])))
    with pytest.raises(RegularizerError, match=re.escape(sentence)):
        graphreg.set_rng_state(module, change(copy.deepcopy(before)))
    assert graphreg.rng_state(module) == before


def test_the_streams_of_a_state_are_found_by_name() -> None:
    """The order is that of the regularizers, which need not come in the order of the run that saved it; the seed is the state's."""
    module, other = noisy(rng=0), noisy(rng=1)
    state = graphreg.rng_state(module)
    graphreg.set_rng_state(other, {**state, "streams": dict(reversed(state["streams"].items()))})
    assert graphreg.rng_state(other) == state and torch.equal(draw(other), draw(module))


def test_buffers_may_be_averaged() -> None:
    """torch averages all buffers, and rounds integers; the noise of the copy is the module's all the same, and the module is as it was."""
    module, twin = noisy(), noisy()
    averaged = torch.optim.swa_utils.AveragedModel(module, use_buffers=True)
    for _ in range(3):
        assert torch.equal(draw(module), draw(twin))
        averaged.update_parameters(module)
    assert graphreg.rng_state(module) == graphreg.rng_state(twin)
    copied = averaged.module
    assert graphreg.rng_state(copied) == graphreg.rng_state(module)
    assert not torch.equal(draw(copied), draw(copied))
    with graphreg.frozen_noise(copied):
        assert torch.equal(draw(copied), draw(copied))
    with pytest.raises(GraphRegError, match=r"AveragedModel is not a module that graphreg rewrote. Give its attribute 'module', which is"):
        graphreg.rng_state(averaged)


def test_a_state_resumes_a_compiled_module_without_compiling_again() -> None:
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    module = noisy()
    run = torch.compile(module, fullgraph=True, backend=counter)
    draw(run)
    state = json.loads(json.dumps(graphreg.rng_state(run)))
    expected = [draw(run) for _ in range(3)]
    graphreg.set_rng_state(run, state)
    assert all(torch.equal(draw(run), each) for each in expected)
    assert counter.frame_count == 1


def test_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 draws as one process does, the others other masks, unless they shall be the same; the state carries that."""
    module = noisy()
    alone = draw(copy.deepcopy(module))
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: 3)
    key = module.graphreg_rules.key
    expected = ranked(key.keys, 3)
    assert torch.equal(key(), expected)
    key.seek(0)
    assert not torch.equal(draw(copy.deepcopy(module)), alone)
    graphreg.set_ranks(module, "same")
    assert torch.equal(draw(copy.deepcopy(module)), alone)
    other = noisy(rng=1)
    graphreg.set_rng_state(other, graphreg.rng_state(module))
    assert torch.equal(draw(other), alone)
    graphreg.set_ranks(module, "differ")
    assert not torch.equal(draw(copy.deepcopy(module)), alone)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    assert torch.equal(draw(module), alone)


@pytest.mark.parametrize("ranks", ["alike", True, None, 1])
def test_an_unknown_word_for_ranks(ranks: Any) -> None:
    with pytest.raises(RegularizerError, match=re.escape(f"ranks={ranks!r} is not allowed; give 'differ'")):
        graphreg.set_ranks(noisy(), ranks)


# ---- sample


def test_samples_are_the_calls_that_noise_on_gives() -> None:
    module = noisy(Net)
    twin = copy.deepcopy(module).eval()
    with graphreg.noise_on(twin), torch.no_grad():
        passes = torch.stack([draw(twin) for _ in range(5)])
    samples = graphreg.sample(module, X, 5)
    assert samples.n == 5 and torch.equal(samples.outputs, passes)
    torch.testing.assert_close(samples.mean, passes.mean(0))
    torch.testing.assert_close(samples.spread, passes.std(0))
    assert not samples.mean.requires_grad
    assert repr(samples).startswith("Samples(n=5, mean: [6, 3], spread: 0.")
    assert graphreg.rng_state(module)["call"] == 5
    assert not torch.equal(graphreg.sample(module, X, 5).mean, samples.mean)  # other passes


def test_everything_else_is_in_eval_mode_and_gets_its_own_back() -> None:
    module = noisy(Net)
    module.norm.eval()
    before = {name: m.training for name, m in module.named_modules()}
    statistics = copy.deepcopy(module.state_dict())
    graphreg.sample(module, X, 2)
    assert {name: m.training for name, m in module.named_modules()} == before
    assert all(torch.equal(value, statistics[name]) for name, value in module.state_dict().items())
    graphreg.set_strength(module, "dropout", 0.0)
    graphreg.set_strength(module, "noise", 0.0)
    quiet = graphreg.sample(module, X, 3)  # the model's own dropout is off
    assert not quiet.spread.any() and torch.equal(quiet.mean, draw(module.eval()))


def test_modes_come_back_after_an_error() -> None:
    module = noisy(Net)
    with pytest.raises(RuntimeError):
        graphreg.sample(module, torch.ones(2, 5), 2)
    assert all(m.training for m in module.modules())
    assert not any(leaf.forced for leaf in module.graphreg_rules.children())


def test_the_mean_comes_near_to_what_inverted_dropout_expects() -> None:
    """A linear read-out of inverted dropout: E = the model's own output; spread by hand, p / (1 - p) * sum of (w h)^2."""
    torch.manual_seed(1)
    model = Plain().double()
    module = graphreg.regularize(model, BernoulliDropout("tanh", 0.25), rng=0)
    x, n = X.double(), 800
    samples = graphreg.sample(module, x, n, keep=False)
    assert samples.outputs is None
    h, w = torch.tanh(model.a(x)), model.b.weight
    variance = 0.25 / 0.75 * (h.square() @ w.T.square())
    assert float(((samples.mean - model(x)) / (variance / n).sqrt()).abs().max().detach()) < 4.5
    torch.testing.assert_close(samples.spread, variance.sqrt().detach(), rtol=0.08, atol=0)


class Several(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 4)

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Any]:
        h = self.a(x).relu()
        return {"h": (h, h.argmax(1)), "sum": (h.half() + y), "none": None}


def test_structures_and_dtypes() -> None:
    torch.manual_seed(0)
    module = graphreg.regularize(Several(), dropout={"a": 0.5}, rng=0)
    samples = graphreg.sample(module, {"x": X, "y": torch.ones(4).half()}, 3)
    assert samples.outputs["sum"].shape == (3, 6, 4) and samples.outputs["sum"].dtype == torch.float16
    assert samples.mean["sum"].dtype == torch.float32 and samples.mean["h"][1].dtype == torch.float64
    torch.testing.assert_close(samples.mean["h"][1], samples.outputs["h"][1].double().mean(0))
    assert samples.mean["none"] is None
    again = graphreg.sample(module, (X, torch.ones(4).half()), 1)
    assert again.spread["sum"].isnan().all() and torch.equal(again.mean["sum"], again.outputs["sum"][0].float())


@pytest.mark.parametrize("way", ["torch.compile", "module.compile"])
def test_sampling_a_compiled_module_compiles_once(way: str) -> None:
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    module = noisy(Net)
    run: Any = torch.compile(module, fullgraph=True, backend=counter) if way == "torch.compile" else module
    if way == "module.compile":
        module.compile(fullgraph=True, backend=counter)
    ours = graphreg.sample(run, X, 4)
    theirs = graphreg.sample(noisy(Net), X, 4)
    torch.testing.assert_close(ours.outputs, theirs.outputs, rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 1
    assert all(m.training for m in run.modules())


def test_attached_penalties_leave_the_output_as_it_is() -> None:
    module = graphreg.regularize(Plain(), hidden_dropout=0.5, hidden_l1=0.1, penalties="attach", scale=1.0, rng=0)
    assert graphreg.sample(module, X, 2).outputs.shape == (2, 6, 3)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    module = noisy()
    for stream, progress, shown in (
        (Terminal(), None, True),
        (Terminal(), False, False),
        (io.StringIO(), None, False),
        (io.StringIO(), True, True),
    ):
        monkeypatch.setattr(sys, "stderr", stream)
        graphreg.sample(module, X, 3, progress=progress)
        text = stream.getvalue()
        assert ("\rgraphreg.sample: 0 of 3 passes" in text) == shown
        assert text.endswith("\r\x1b[K") if shown else not text


@dataclass
class Unknown:
    logits: Tensor


class Wrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Unknown:
        return Unknown(self.a(x).relu())


@pytest.mark.parametrize("n", [0, -1, 1.5, "3", True, None])
def test_a_number_of_passes_that_is_none(n: Any) -> None:
    with pytest.raises(
        RegularizerError, match=re.escape(f"n={n!r} is not allowed; n is the number of passes, a whole number of 1 or more")
    ):
        graphreg.sample(noisy(), X, n)


def test_inputs_that_are_none() -> None:
    with pytest.raises(RegularizerError, match="inputs=None is not allowed; give a tensor, a tuple"):
        graphreg.sample(noisy(), None, 2)
    with pytest.raises(GraphRegError, match="inputs=float is not allowed"):
        graphreg.sample(noisy(), 1.0, 2)
    with pytest.raises(GraphRegError, match="inputs carry an array"):
        graphreg.sample(noisy(), (X.numpy(),), 2)
    with pytest.raises(RegularizerError, match="progress='yes' is not allowed; give True, False, or None"):
        graphreg.sample(noisy(), X, 2, progress="yes")  # type: ignore[arg-type]


def test_an_output_without_a_known_tensor() -> None:
    module = graphreg.regularize(Wrapped(), dropout={"relu": 0.5})
    with pytest.raises(RegularizerError, match=r"output is Unknown, and no tensor is found in it to average. Make its class known"):
        graphreg.sample(module, X, 2)


def test_noise_under_inference_mode_leaves_a_module_that_trains() -> None:
    """Inference tensors cannot be saved for backward: the counter must not become one."""
    module = noisy()
    for run in (module, torch.compile(module, backend="aot_eager", fullgraph=True)):
        with torch.inference_mode(), graphreg.noise_on(module):
            draw(run)
        loss = draw(run).square().sum()
        loss.backward()
        assert all(p.grad is not None for p in module.parameters())
