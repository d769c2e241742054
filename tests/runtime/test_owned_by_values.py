"""Penalties on values that keep a state or learn: by hand, compiled, in blocks, saved, in place."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import graphreg
from graphreg import GraphRegError, ModelInput, Penalty, RegularizerError
from graphreg.testing import check_regularizer

State = dict[str, Tensor]
LEARNED = "graphreg_rules.centre_of_units.state.body_0.centre"
X = torch.tensor([[1.0, 2.0], [3.0, 6.0]])


class MeanDrift(Penalty, keys=("drift_of",)):
    """The distance of the mean value of each unit from its moving average, which begins at 0."""

    mask: ModelInput = None

    def init_state(self, like: Tensor) -> State:
        return {"mean": like.new_zeros(like.shape[-1])}

    def __call__(self, z: Tensor, state: State, mask: Tensor | None) -> tuple[Tensor, State]:
        mean = z.flatten(0, -2).mean(0) if mask is None else (z * mask[:, None]).sum(0) / mask.sum()
        return (mean - state["mean"]).square().mean(), {"mean": 0.5 * state["mean"] + 0.5 * mean.detach()}


class UnitCentre(Penalty, keys=("centre_of_units",)):
    """The distance from a learned centre, as the centre loss of one class; ``seen`` counts the calls."""

    def init_state(self, like: Tensor) -> State:
        return {"centre": nn.Parameter(like.new_ones(like.shape[-1])), "seen": torch.zeros(())}

    def __call__(self, units: Tensor, weight: Tensor, state: State) -> tuple[Tensor, State]:
        return (units - state["centre"]).square().mean() + 0 * weight, {"seen": state["seen"] + 1}


class StepTempo(Penalty, keys=("tempo_of",)):
    """How far the mean step is from the one of the last call."""

    time_axis: int = 1
    lengths: ModelInput = None

    def init_state(self, like: Tensor) -> State:
        return {"step": like.new_zeros(like.shape[-1])}

    def __call__(self, steps: Tensor, lengths: Tensor | None, state: State) -> tuple[Tensor, State]:
        step = steps.diff(dim=0).mean((0, 1))
        return (step - state["step"]).square().sum(), {"step": step.detach()}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Identity())
        self.head = nn.Linear(2, 1)
        nn.init.eye_(self.body[0].weight)  # type: ignore[arg-type]

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.head(self.body(x))  # type: ignore[no-any-return]


def made(*regularizers: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    asked = regularizers or (MeanDrift("body.0", 1.0), UnitCentre("body.0", 2.0))
    return graphreg.regularize(Net(), *asked, example_inputs=X, rng=0, **options)


def drift(module: Any) -> float:
    return float(module(X).penalties["drift_of"].detach())


def test_by_hand() -> None:
    """The means are 2 and 4. Moving average: 0, then half of them, then three quarters."""
    module = made()
    assert [drift(module) for _ in range(3)] == [10.0, 2.5, 0.625]
    centre = module(X).penalties["centre_of_units"]
    assert float(centre.detach()) == 2 * (0 + 1 + 4 + 25) / 4
    centre.backward()
    gradient = module.get_parameter(LEARNED).grad
    assert torch.equal(gradient, 2 * torch.tensor([-1.0, -3.0]))
    state = graphreg.rng_state(module)["state"]
    assert torch.equal(state["drift_of"]["body.0"]["mean"], torch.tensor([1.875, 3.75])) and state["centre_of_units"]["body.0"]["seen"] == 4
    graphreg.reset_state(module, "drift_of")
    assert drift(module) == 10.0


def test_it_moves_on_in_train_mode_alone() -> None:
    module = made()
    drift(module)
    for call in (module.eval(), module.train()):
        stays = [graphreg.noise_off(module), torch.inference_mode()] if call.training else [torch.no_grad()]
        for context in stays:
            with context:
                assert drift(module) == 2.5
    with graphreg.penalties_off(module):
        assert drift(module) == 0
    torch.func.grad(lambda x: module(x).output.sum())(X)
    assert [drift(module), drift(module)] == [2.5, 0.625]


def test_compiled_in_blocks_and_attached() -> None:
    """The same penalties, states and gradients as in eager, and one graph."""
    torch._dynamo.reset()
    results = []
    for options, compiled in (({}, False), ({}, True), ({"blocks": "body"}, False), ({"blocks": "body"}, True)):
        module = made(**options)
        run = torch.compile(module, backend="eager" if options else "aot_eager", fullgraph=True) if compiled else module
        calls = [run(X).penalties for _ in range(3)]
        sum(value for call in calls for value in call.values()).backward()  # type: ignore[arg-type]
        gradients = [module.get_parameter(name).grad for name in ("body.0.weight", LEARNED)]
        results.append(([*calls[2].values()], gradients, [*graphreg.rng_state(module)["state"]["drift_of"]["body.0"].values()]))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0])
    attached = made(penalties="attach", scale=1)
    for _ in range(3):
        attached(X).sum().backward()
    torch.testing.assert_close([*attached.penalties().values()], [value.detach() for value in results[0][0]])


def test_it_is_saved_and_copied() -> None:
    module = made()
    drift(module)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), made()):
        twin.load_state_dict(module.state_dict())
        graphreg.set_rng_state(twin, graphreg.rng_state(module))
        assert [drift(twin), drift(twin)] == [2.5, 0.625]
    assert list(graphreg.model_state_dict(module)) == list(Net().state_dict())
    assert "trains body.0.weight, graphreg_rules.centre_of_units.state.body_0.centre" in str(graphreg.report(module))
    made().load_state_dict(Net().state_dict())  # strictly: a checkpoint of the model alone


@pytest.mark.parametrize("cell", [False, True])
def test_steps(cell: bool) -> None:
    """``like`` is [time, batch, units], of a value and of the calls of a cell."""

    class Walk(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.same = nn.RNNCell(2, 3), nn.Identity()
            self.rnn = nn.RNN(2, 3, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            if not cell:
                return self.rnn(x)[0]  # type: ignore[no-any-return]
            h = x.new_zeros(x.shape[0], 3)
            for i in range(3):
                h = self.cell(x[:, i], h)
            return h

    torch.manual_seed(0)
    x = torch.randn(4, 3, 2)
    module = graphreg.regularize(Walk(), StepTempo("cell" if cell else "rnn:0", 1.0), example_inputs=x)
    first, second = (float(module(x).penalties["tempo_of"].detach()) for _ in range(2))
    assert first > 0 == pytest.approx(second, abs=1e-12)
    (step,) = graphreg.rng_state(module)["state"]["tempo_of"].values()
    assert step["step"].shape == (3,)


def test_in_place() -> None:
    """All structures share the state; it starts anew if the value has other units; what learns is refused."""
    model = graphreg.regularize_(Net(), MeanDrift("body.0", 1.0, mask="mask"), rng=0, penalties="return", missing="ignore")
    mask = torch.tensor([1.0, 0.0])
    assert [float(model(X, mask).penalties["drift_of"].detach()) for _ in range(2)] == [2.5, 0.625]
    twin, state = copy.deepcopy(model), graphreg.rng_state(model)
    assert float(twin(X, mask).penalties["drift_of"].detach()) == 0.15625
    other = graphreg.regularize_(Net(), MeanDrift("body.0", 1.0, mask="mask"), rng=0, penalties="return")
    graphreg.set_rng_state(other, state)
    assert float(other(X, mask).penalties["drift_of"].detach()) == 0.15625
    model = graphreg.regularize_(Net(), MeanDrift("body.0", 1.0), rng=0, penalties="return")
    assert [drift(model), float(model(X, X).penalties["drift_of"].detach()), drift(model)] == [10.0, 2.5, 0.625]
    model.body[0], model.head = nn.Linear(2, 3, bias=False), nn.Linear(3, 1)
    assert graphreg.rng_state(model)["state"]["drift_of"]["body.0"]["mean"].shape == (2,)
    drift(model)
    assert graphreg.rng_state(model)["state"]["drift_of"]["body.0"]["mean"].shape == (3,)
    with pytest.raises(RegularizerError, match="UnitCentre keeps tensors of its own, and regularize_ adds none to the model"):
        graphreg.regularize_(Net(), UnitCentre("body.0", 1.0), scale=1)(X)


def test_what_every_regularizer_must_satisfy() -> None:
    check_regularizer(MeanDrift, backend=None)
    check_regularizer(UnitCentre, "1", backend=None)
    check_regularizer(StepTempo, "**@Embedding", backend=None)


def test_what_is_refused() -> None:
    for argument in ("values", "vjp"):
        with pytest.raises(RegularizerError, match=rf"asks for state and for {argument}\. A state belongs to one site"):
            formula = {"values": lambda self, values, state: 0, "vjp": lambda self, vjp, state: 0}[argument]
            type("AtOnce", (Penalty,), {"__call__": formula, "init_state": lambda self, like: {}})
    with pytest.raises(RegularizerError, match=r"body.0: it has a state that depends on the value's shape.* Give example_inputs"):
        graphreg.regularize(Net(), MeanDrift("body.0", 1.0))
    with pytest.raises(RegularizerError, match="a backend's graphs keep none"):
        graphreg.backend(MeanDrift("body.0", 1.0))
    module = made(MeanDrift("body.0", 1.0))
    x = X.clone().requires_grad_()
    value = checkpoint(lambda x: sum(module(x).penalties.values()) + module(x).output.sum(), x, use_reentrant=False)
    with pytest.raises(GraphRegError, match="a backward pass runs the forward again, but the first run has replaced the state"):
        value.backward()
