"""Penalties switched off for a batch: each is 0 and has no gradient, and noise, schedules, ramps and states are what they were."""

from __future__ import annotations

import copy
import pickle
import threading
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from compile_ways import compiled, in_both_ways
from torch import Tensor, nn

import graphreg
from graphreg.passes import BernoulliDropout, Contractive, Covariance, HiddenL1, L0Gates, RecurrentNorm, SpectralPenalty, WeightL2
from lacking import needs_result

X = torch.linspace(-1, 1, 48).view(6, 8)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))


def net() -> nn.Module:
    torch.manual_seed(0)
    return Net()


PENALTIES = HiddenL1("a", 0.1), WeightL2("*", 0.2), Covariance("tanh", 0.3), SpectralPenalty("a.weight", 0.4)


def noisy(**options: Any) -> Any:
    return graphreg.regularize(net(), BernoulliDropout("tanh", 0.5), *PENALTIES, rng=7, **options)


def step(module: Any, run: Any = None) -> list[Tensor]:
    """The output, the penalties and the gradients of a call in train mode."""
    module.zero_grad()
    result = (module if run is None else run)(X)
    (result.output.square().sum() + sum(result.penalties.values())).backward()
    return [result.output.detach(), *(each.detach() for each in result.penalties.values()), *(p.grad for p in module.parameters())]


def same(given: Any, wanted: Any) -> None:
    torch.testing.assert_close(given, wanted, rtol=0, atol=0)


def without(calls: int = 0) -> list[Tensor]:
    """What ``step`` gives with the noise alone, after so many calls, with a 0 for each of the penalties."""
    module = graphreg.regularize(net(), BernoulliDropout("tanh", 0.5), rng=7)
    for _ in range(calls):
        module(X)
    output, *gradients = step(module)
    return [output, *[torch.zeros(())] * len(PENALTIES), *gradients]


def test_outputs_and_gradients_are_those_without_penalties() -> None:
    module = noisy()
    with graphreg.penalties_off(module):
        same(step(module), without())
        assert list(module(X).penalties) == ["hidden_l1", "weight_l2", "covariance", "spectral"]
    penalties = module(X).penalties
    assert all(value > 0 and value.requires_grad for value in penalties.values())


def test_later_calls_draw_what_they_would_have_drawn() -> None:
    module, twin = noisy(), noisy()
    with graphreg.penalties_off(module):
        step(module)
    twin(X)
    same(step(module)[0], step(twin)[0])


@pytest.mark.parametrize(
    ("model", "penalty", "given"),
    [
        (net, Contractive("tanh", 0.1, wrt="x"), X),
        (lambda: nn.Sequential(nn.Linear(8, 5), nn.ReLU()), L0Gates("0", 0.1), X),
        (lambda: nn.Sequential(nn.RNN(8, 5, batch_first=True)), RecurrentNorm("0", 0.1), X[None]),
        (net, WeightL2("*", graphreg.schedules.linear(1.0, 0.0, 4)), X),
        (net, WeightL2("*", 0.5, reduction="sum"), X.double()),
    ],
    ids=["vjp", "of a splice", "steps", "schedule", "float64"],
)
def test_each_kind_of_penalty_is_off(model: Any, penalty: Any, given: Tensor) -> None:
    torch.manual_seed(0)
    module = graphreg.regularize(model().to(given.dtype), penalty, rng=0, example_inputs=given)
    first = module(given).penalties
    with graphreg.penalties_off(module):
        off = module(given).penalties
    after = module(given).penalties
    assert first.keys() == off.keys() == after.keys() and len(off) == 1
    for name in off:
        assert off[name] == 0 and not off[name].requires_grad and off[name].dtype == first[name].dtype and off[name].dim() == 0
        assert first[name] != 0 and after[name] != 0 and after[name].requires_grad


def test_a_schedule_goes_on_and_a_ramp_stays() -> None:
    strengths = WeightL2("*", graphreg.schedules.linear(1.0, 0.0, 10)), HiddenL1("*", graphreg.by_depth(0.0, 1.0))
    deep = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3)))
    module, twin = (graphreg.regularize(copy.deepcopy(deep), *strengths) for _ in range(2))
    ramp = graphreg.site_strengths(module)["hidden_l1"]
    for call in range(4):
        if call in (1, 2):
            with graphreg.penalties_off(module):
                module(X)
            twin(X)
        else:
            same(step(module), step(twin))
    assert graphreg.strengths(module) == graphreg.strengths(twin)
    assert graphreg.site_strengths(module)["hidden_l1"] == ramp and set(ramp.values()) == {0.0, 1.0}


def test_a_state_is_not_replaced() -> None:
    module, twin = (graphreg.regularize(net(), SpectralPenalty("a.weight", 1.0), rng=0) for _ in range(2))
    step(module), step(twin)
    with graphreg.penalties_off(module):
        step(module)
    same(step(module), step(twin))


def test_a_formula_is_not_computed() -> None:
    class Counted(graphreg.Penalty, keys=("counted_when_off",), on="values"):
        """Counts its calls."""

        def __call__(self, z: Tensor) -> Tensor:
            calls.append(None)
            return z.square().mean()

    calls: list[None] = []
    module = graphreg.regularize(net(), Counted("tanh", 1.0))
    before = len(calls)
    with graphreg.penalties_off(module):
        module(X)
    assert len(calls) == before
    module(X)
    assert len(calls) == before + 1


@in_both_ways
def test_compiled_it_is_eager_and_each_setting_is_compiled_once(way: str) -> None:
    inner = "aot_eager" if way == "torch.compile" else "eager"
    module, counter = noisy(), torch._dynamo.testing.CompileCounterWithBackend(inner)
    eager = copy.deepcopy(module)
    run = compiled(module, way, counter)
    for i in range(2):
        torch.testing.assert_close(step(module, run), step(eager))
        with graphreg.penalties_off(module), graphreg.penalties_off(eager):
            given = step(module, run)
            same(given, step(eager))
            same(given, without(2 * i + 1))
    assert counter.frame_count == 2


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("returns_loss", [False, True], ids=["output", "loss"])
def test_attached_it_is_the_model(returns_loss: bool, mode: str) -> None:
    class WithLoss(Net):
        def forward(self, x: Tensor) -> Any:
            return {"loss": super().forward(x).square().sum()} if returns_loss else super().forward(x)

    torch.manual_seed(0)
    model = WithLoss()
    module = graphreg.regularize(copy.deepcopy(model), *PENALTIES[:2], penalties="attach", scale=1).train(mode == "train")
    gradients = []
    for each in (module, model):
        with graphreg.penalties_off(module):
            result = each(X)
        (result["loss"] if returns_loss else result.square().sum()).backward()
        gradients.append([result["loss"].detach() if returns_loss else result.detach(), *(p.grad for p in each.parameters())])
    same(*gradients)
    module.zero_grad()
    result = module(X)
    (result["loss"] if returns_loss else result.square().sum()).backward()
    assert not torch.equal(module.a.weight.grad, model.a.weight.grad)


def test_blocks_nest_and_an_error_ends_them() -> None:
    module = noisy()

    def are_off() -> bool:
        return all(value == 0 for value in module(X).penalties.values())

    with graphreg.penalties_off(module):
        with graphreg.penalties_off(module), graphreg.noise_off(module):
            assert are_off()
        assert are_off()
    assert not are_off()
    with pytest.raises(ZeroDivisionError), graphreg.penalties_off(module):
        raise ZeroDivisionError
    assert not are_off()
    with graphreg.noise_off(module):
        assert not are_off()


def test_blocks_of_two_threads_overlap() -> None:
    module, entered, leave = noisy(), threading.Event(), threading.Event()

    def other() -> None:
        with graphreg.penalties_off(module):
            entered.set()
            leave.wait(60)

    thread = threading.Thread(target=other)
    with graphreg.penalties_off(module):
        thread.start()
        assert entered.wait(60)
    assert all(value == 0 for value in module(X).penalties.values())
    leave.set()
    thread.join()
    assert all(value != 0 for value in module(X).penalties.values())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))], ids=["deepcopy", "pickle"])
def test_a_copy_that_is_made_in_a_block_is_in_none(copied: Any) -> None:
    module = noisy()
    with graphreg.penalties_off(module):
        twin = copied(module)
    same(step(twin), step(module))
    with graphreg.penalties_off(twin):
        assert all(value == 0 for value in twin(X).penalties.values())
    assert all(value != 0 for value in twin(X).penalties.values())


def test_in_place_for_graphs_of_before_and_of_the_block() -> None:
    model, plain = net(), net()
    graphreg.regularize_(model, *PENALTIES[:2], scale=1)

    def gradient(of: nn.Module, x: Tensor) -> Tensor:
        of.zero_grad()
        of(x).square().sum().backward()
        return of.a.weight.grad.clone()  # type: ignore[no-any-return, union-attr, operator]

    assert not torch.equal(gradient(model, X), gradient(plain, X))
    with graphreg.penalties_off(model):
        same(gradient(model, X), gradient(plain, X))
        same(gradient(model, X[None]), gradient(plain, X[None]))  # another structure, traced in the block
    assert not torch.equal(gradient(model, X[None]), gradient(plain, X[None]))


@pytest.mark.parametrize("penalties", ["return", pytest.param("attach", marks=needs_result)])
def test_a_backend(penalties: Any) -> None:
    model, plain = net(), net()
    options: Any = {"inner": "eager", "scale": 1} if penalties == "attach" else {"inner": "aot_eager"}
    backend = graphreg.backend(*PENALTIES[:3], penalties=penalties, **options)
    run = torch.compile(model, backend=backend)

    def gradients(in_block: bool) -> list[Tensor]:
        model.zero_grad()
        output = run(X)
        told = backend.penalties()
        assert all((value == 0) == in_block for value in told.values()) and len(told) == 3
        loss = output.square().sum()
        (loss if penalties == "attach" else loss + sum(told.values())).backward()
        return [output.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    output = plain(X)
    output.square().sum().backward()
    wanted = [output.detach(), *(p.grad for p in plain.parameters() if p.grad is not None)]
    first = gradients(in_block=False)
    with graphreg.penalties_off(backend):
        torch.testing.assert_close(gradients(in_block=True), wanted)
    same(gradients(in_block=False), first)
    assert not torch.allclose(first[1], wanted[1])
    torch._dynamo.reset()
    with graphreg.penalties_off(backend):
        torch.testing.assert_close(gradients(in_block=True), wanted)  # captured in the block
    same(gradients(in_block=False), first)
