"""Noise switched off for a batch: no splice acts, penalties are what they were, and later calls draw what they would have drawn."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from compile_ways import compiled, in_both_ways
from torch import Tensor, nn

import graphreg
from graphreg.passes import BernoulliDropout, DropConnect, GaussianNoise, HiddenL1, SpectralPenalty, Zoneout

X = torch.linspace(-1, 1, 48).view(6, 8)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.own = nn.Linear(8, 16), nn.Linear(16, 3), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.own(torch.tanh(self.a(x))))


def net(p: float = 0.5) -> nn.Module:
    torch.manual_seed(0)
    model = Net()
    model.own.p = p
    return model


def noisy(p: float = 0.0, **options: Any) -> Any:
    splices = BernoulliDropout("tanh", 0.5), GaussianNoise("a", 0.3), DropConnect("b.weight", 0.4)
    return graphreg.regularize(net(p), *splices, HiddenL1("a", 0.1), rng=7, **options)


def step(module: Any, run: Any = None) -> list[Tensor]:
    """The output, the penalties and the gradients of a call in train mode."""
    module.zero_grad()
    result = (module if run is None else run)(X)
    (result.output.square().sum() + sum(result.penalties.values())).backward()
    return [result.output.detach(), *(each.detach() for each in result.penalties.values()), *(p.grad for p in module.parameters())]


def plain() -> list[Tensor]:
    """What ``step`` gives where nothing is drawn: the model with its penalty alone."""
    return step(graphreg.regularize(net(0.0), HiddenL1("a", 0.1)))


def test_outputs_penalties_and_gradients_are_those_without_splices() -> None:
    module = noisy()
    with graphreg.noise_off(module):
        torch.testing.assert_close(step(module), plain(), rtol=0, atol=0)
    assert not torch.equal(step(module)[0], plain()[0])


def test_later_calls_draw_what_they_would_have_drawn() -> None:
    module, twin = noisy(), noisy()
    first = [step(module), step(twin)]
    with graphreg.noise_off(module):
        step(module)
    step(twin)
    torch.testing.assert_close([first[0], step(module)], [first[1], step(twin)], rtol=0, atol=0)
    assert graphreg.rng_state(module) == graphreg.rng_state(twin)


@in_both_ways
def test_compiled_it_is_eager_and_each_setting_is_compiled_once(way: str) -> None:
    module, counter = noisy(), torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    eager = copy.deepcopy(module)
    run = compiled(module, way, counter)
    for _ in range(2):
        torch.testing.assert_close(step(module, run), step(eager), rtol=0, atol=0)
        with graphreg.noise_off(module), graphreg.noise_off(eager):
            torch.testing.assert_close(step(module, run), step(eager), rtol=0, atol=0)
            torch.testing.assert_close(step(eager), plain(), rtol=0, atol=0)
            step(module, run)
    assert counter.frame_count == 2


def test_the_models_own_dropout_is_off_if_graphreg_draws_it() -> None:
    module = noisy(0.5, own_dropout="seeded")
    with graphreg.noise_off(module):
        torch.testing.assert_close(step(module), plain(), rtol=0, atol=0)
    kept, model = noisy(0.5, own_dropout="keep"), net()
    with graphreg.noise_off(kept):
        torch.manual_seed(3)
        ours = kept(X).output
    torch.manual_seed(3)
    assert torch.equal(ours, model(X))


def test_the_inner_block_decides() -> None:
    module = noisy()
    off = module.eval()(X).output
    with graphreg.noise_on(module):
        with graphreg.noise_off(module):
            assert torch.equal(module(X).output, off)
            with graphreg.noise_on(module):
                assert not torch.equal(module(X).output, off)
            assert torch.equal(module(X).output, off)
        assert not torch.equal(module(X).output, off)
    assert torch.equal(module(X).output, off)
    with graphreg.noise_off(module):
        samples = graphreg.sample(module, X, n=4)
    assert bool((samples.spread > 0).any())


def test_an_error_in_the_block_leaves_the_noise_on() -> None:
    module = noisy()
    with pytest.raises(ZeroDivisionError), graphreg.noise_off(module):
        raise ZeroDivisionError
    assert not torch.equal(step(module)[0], plain()[0])


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))], ids=["deepcopy", "pickle"])
def test_a_copy_that_is_made_in_a_block_is_in_none(copied: Any) -> None:
    module = noisy()
    with graphreg.noise_off(module):
        twin = copied(module)
    torch.testing.assert_close(step(twin), step(module), rtol=0, atol=0)
    with graphreg.noise_on(module.eval()):
        twin = copied(module)
    assert torch.equal(twin(X).output, module(X).output)
    with graphreg.noise_on(twin):
        assert not torch.equal(twin(X).output, module(X).output)
    assert torch.equal(twin(X).output, module(X).output)


def test_frozen_masks_stay_frozen() -> None:
    module = noisy()
    with graphreg.frozen_noise(module):
        before = module(X).output
        with graphreg.noise_off(module):
            module(X)
        assert torch.equal(module(X).output, before)


def test_a_penalty_keeps_its_state() -> None:
    module = graphreg.regularize(net(0.0), SpectralPenalty("a.weight", 1.0))
    with graphreg.noise_off(module):
        inside = [step(module)[1] for _ in range(2)]
    outside = [step(module)[1] for _ in range(2)]
    assert torch.equal(inside[0], inside[1]) and torch.equal(outside[0], inside[0]) and outside[1] > outside[0]


class Loop(nn.Module):
    """A cell that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        state: Any = None
        for _ in range(2):
            state = self.cell(x, state)
        return state  # type: ignore[no-any-return]


def test_a_splice_with_a_form_for_eval_mode_takes_it() -> None:
    torch.manual_seed(0)
    module = graphreg.regularize(Loop(), Zoneout("cell*", 0.5))
    with graphreg.noise_off(module):
        off = module(X).output
    assert torch.equal(off, module.eval()(X).output)


def test_a_module_without_splices_is_not_changed() -> None:
    module = graphreg.regularize(net(0.0), HiddenL1("a", 0.1))
    with graphreg.noise_off(module):
        torch.testing.assert_close(step(module), plain(), rtol=0, atol=0)


def test_in_place_for_graphs_of_before_and_of_the_block() -> None:
    model = net(0.0)
    expected = model(X).detach()
    graphreg.regularize_(model, BernoulliDropout("tanh", 0.5), GaussianNoise("a", 0.3), rng=7)
    assert not torch.equal(model(X), expected)
    with graphreg.noise_off(model):
        assert torch.equal(model(X), expected)
        assert torch.allclose(model(X.double().float()[None])[0], expected)  # another structure, traced in the block
    assert not torch.equal(model(X), expected) and not torch.equal(model(X[None])[0], expected)


def test_a_backend() -> None:
    model, twin = net(), graphreg.regularize(net(), BernoulliDropout("tanh", 0.5), rng=7, own_dropout="seeded")
    expected = net(0.0)(X)
    backend = graphreg.backend(BernoulliDropout("tanh", 0.5), rng=7, inner="aot_eager", own_dropout="seeded")
    run = torch.compile(model, backend=backend)
    drawn = [twin(X).output for _ in range(3)]
    assert torch.equal(run(X), drawn[0])
    with graphreg.noise_off(backend):
        assert torch.equal(run(X), expected)
    assert torch.equal(run(X), drawn[2])
