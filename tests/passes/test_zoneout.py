from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphreg
from graphreg.passes import BernoulliDropout, Zoneout
from spliced import Given, needs_a_rate
from two_layers import text


class Loop(nn.Module):
    """A cell that is called three times; ``start``: whether with a first state of ones, or with none."""

    def __init__(self, kind: str = "GRUCell", start: bool = False) -> None:
        super().__init__()
        self.cell, self.start = getattr(nn, kind)(4, 5), start

    def forward(self, x: Tensor) -> Tensor:
        first = torch.ones(x.shape[1], 5) if self.start else None
        state: Any = (first, 2 * first) if self.start and isinstance(self.cell, nn.LSTMCell) else first
        for t in range(3):
            state = self.cell(x[t], state)
            if isinstance(self.cell, nn.LSTMCell):
                h, c = state
                state = (h, c)
        return state[0] if isinstance(self.cell, nn.LSTMCell) else state


class Steps(nn.Module):
    """Two calls, with a state that is given."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(4, 5)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return self.cell(x, self.cell(x, h))


X = torch.randn(3, 6, 4)


def test_before_and_after() -> None:
    model = Steps()
    module = graphreg.regularize(model, zoneout=0.5, rng=0)
    assert (
        text(module.code)
        == """key = self.graphreg_rules.key()
cell = self.cell(x, h)
cell_zoneout = self.graphreg_rules.cell_zoneout(cell, key, previous = h)
cell_1 = self.cell(x, cell_zoneout)
cell_1_zoneout = self.graphreg_rules.cell_1_zoneout(cell_1, key, previous = cell_zoneout)
return graphreg_Regularized(cell_1_zoneout, {})"""
    )
    before = text(graphreg.trace(model).graphs["both"].python_code("self").src)
    assert text(graphreg.strip(module).code) == before and "zoneout" not in before


def test_by_hand() -> None:
    """Units 1 of the first example and 0 of the second keep their old state; in eval mode a quarter of the old state comes in."""
    z, old = torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True), torch.tensor([[5.0, 6.0], [7.0, 8.0]], requires_grad=True)
    noise, weight = Given(torch.tensor([[1.0, 0.0], [0.0, 1.0]])), torch.tensor(0.25)
    y = Zoneout("0", 0.25)(z=z, weight=weight, noise=noise, previous=old)
    assert torch.equal(y, torch.tensor([[1.0, 6.0], [7.0, 4.0]]))
    of_z, of_old = torch.autograd.grad(y.sum(), (z, old))
    assert torch.equal(of_z, noise.draw) and torch.equal(of_old, 1 - noise.draw)
    assert torch.equal(Zoneout("0", 0.25).in_eval(z, weight, old), torch.tensor([[2.0, 3.0], [4.0, 5.0]]))


def masks(module: nn.Module, names: list[str]) -> dict[str, Tensor]:
    """The masks of the next call, read from what each splice does to ones over zeros."""
    rules: Any = module.graphreg_rules
    key = rules.key()
    rules.key.seek(int(rules.key.step) - 1)
    return {name: rules.get_submodule(name)(torch.ones(6, 5), key, previous=torch.zeros(6, 5)) for name in names}


@pytest.mark.parametrize("start", [False, True])
@pytest.mark.parametrize("kind", ["RNNCell", "GRUCell", "LSTMCell"])
def test_the_loop_is_that_of_the_paper_given_the_masks(kind: str, start: bool) -> None:
    """The recurrence of the paper's equations, written anew here with torch's cell, in train and in eval mode, gradients included."""
    model = Loop(kind, start)
    module = graphreg.regularize(model, Zoneout("*", 0.3), rng=0)
    ports = ("h", "c") if kind == "LSTMCell" else ("",)
    calls = ["cell", "cell_1", "cell_2"]
    names = [name for name in module.graphreg_rules._modules if name.endswith("zoneout")]  # type: ignore[union-attr]
    assert len(names) == (5 if kind == "LSTMCell" else 3)  # of the last step nothing reads c
    for training in (True, False):
        module.train(training)
        drawn = masks(module.train(), names) if training else {name: torch.full((6, 5), 0.7) for name in names}
        module.train(training)
        one = torch.ones(6, 5) if start else torch.zeros(6, 5)
        states = [one, 2 * one][: len(ports)]
        for step, call in zip(X, calls, strict=True):
            new = model.cell(step, tuple(states) if len(ports) == 2 else states[0])
            new = new if len(ports) == 2 else (new,)
            for i, port in enumerate(ports):
                name = f"{call}_{port}_zoneout" if i else f"{call}_zoneout"
                mask = drawn.get(name, torch.ones(6, 5))
                states[i] = mask * new[i] + (1 - mask) * states[i]
        y = module(X).output
        torch.testing.assert_close(y, states[0])
        ours, theirs = (torch.autograd.grad(each.sum(), list(model.parameters())) for each in (y, states[0]))
        torch.testing.assert_close(ours, theirs)


def test_the_share_and_the_draws() -> None:
    """Each unit keeps its old state with the probability of the weight, with other draws at each step."""
    module = graphreg.regularize(Loop(), Zoneout("*", 0.3), rng=1)
    drawn = list(masks(module, ["cell_zoneout", "cell_1_zoneout", "cell_2_zoneout"]).values())
    assert not torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[1], drawn[2])
    assert set(drawn[0].unique().tolist()) == {0.0, 1.0} and float(torch.stack(drawn).mean()) == pytest.approx(0.7, abs=0.2)


def test_compiled_it_is_eager() -> None:
    results = []
    for compiled in (False, True):
        torch.manual_seed(0)
        module = graphreg.regularize(Steps(), zoneout=0.4, rng=3)
        step: Any = torch.compile(module, backend="aot_eager", fullgraph=True) if compiled else module
        x = X[0].clone().requires_grad_()
        y = step(x, torch.ones(6, 5)).output
        y.square().sum().backward()
        module.eval()
        results.append((y, x.grad, step(X[0], torch.ones(6, 5)).output))
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=1e-7)


def test_modes_strength_0_and_verify() -> None:
    model = Loop()
    module = graphreg.regularize(model, zoneout=0.4, rng=0, example_inputs=X, verify=True)
    assert not torch.equal(module(X).output, module(X).output)
    module.eval()
    first = module(X).output
    assert torch.equal(module(X).output, first) and not torch.allclose(first, model(X)) and graphreg.rng_state(module)["call"] == 2
    with graphreg.noise_on(module):
        assert not torch.equal(module(X).output, first)
    graphreg.set_strength(module, "zoneout", 0.0)
    assert torch.equal(module(X).output, model(X)) and torch.equal(module.train()(X).output, model(X))


def test_with_dropout_on_the_state() -> None:
    """Other splices at the state act on what the next call gets, and so on what it may keep."""
    module = graphreg.regularize(Steps(), [BernoulliDropout("cell", 0.5), Zoneout("cell_1", 0.5)], rng=0)
    assert "cell_1_zoneout(cell_1, key, previous = cell_dropout)" in module.code


def test_in_place_where_both_modes_run_the_graph() -> None:
    model = Loop()
    expected = graphreg.regularize(model, zoneout=0.4, rng=0).eval()(X).output
    graphreg.regularize_(model, zoneout=0.4, rng=0, eval_penalties=True)
    assert torch.equal(model.eval()(X), expected)


def test_errors() -> None:
    needs_a_rate(Zoneout)

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.out = nn.GRU(4, 5), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.rnn(x)[0])

    layer = Layer()
    message = r"Zoneout at rnn: it acts on the states that nn\.RNNCell, .* and this value is not such a state\. A recurrent layer computes"
    with pytest.raises(graphreg.RegularizerError, match=message):
        graphreg.regularize(layer, Zoneout("rnn", 0.1))
    with pytest.raises(graphreg.RegularizerError, match=r"Zoneout at 0: it acts on the states .* and this value is not such a state\.$"):
        graphreg.regularize(nn.Sequential(nn.Linear(2, 2)), Zoneout("0", 0.1))
    with pytest.raises(graphreg.NoMatchError, match=r"none of the default sites of Zoneout \(the states of nn\.RNNCell, nn\.GRUCell and"):
        graphreg.regularize(layer, zoneout=0.1)
    whole = r"Zoneout at cell_1.*: cell_1 got both of its states as one object\. Pass them as a tuple of two, cell\(x, \(h, c\)\)"

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.LSTMCell(4, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.cell(x[1], self.cell(x[0]))[0]

    with pytest.raises(graphreg.RegularizerError, match=whole):
        graphreg.regularize(Whole(), zoneout=0.1)
    with pytest.raises(graphreg.RegularizerError, match=r"zoneout: Zoneout acts in eval mode, too, .*eval_penalties=True"):
        graphreg.regularize_(Loop(), zoneout=0.1)
    with pytest.raises(graphreg.RegularizerError, match=r"zoneout: Zoneout is not possible in a backend"):
        graphreg.backend(zoneout=0.1)
    with pytest.raises(graphreg.RegularizerError, match=r"Drawn\.in_eval asks for noise; the engine supplies z, weight, previous, "):

        class Drawn(graphreg.Splice):
            def __call__(self, z: Tensor, weight: Tensor) -> Tensor:
                return z * weight

            def in_eval(self, z: Tensor, noise: graphreg.Noise) -> Tensor:
                return z
