"""penalties="attach" compiled whole, with a scale that is told at each call."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import graphreg
from graphreg.runtime.rewritten_module import RewrittenModule
from graphreg.session.hosts import rules_of

X = torch.ones(3, 4)


class Told:
    """A number that changes, as a GradScaler, a function or a tensor has it."""

    def __init__(self, kind: str) -> None:
        self.kind, self.value, self.tensor = kind, 8.0, torch.tensor(8.0)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=8.0, enabled=kind != "disabled")
        self.scale: Any = {"scaler": self.scaler, "disabled": self.scaler, "tensor": self.tensor}.get(kind) or (
            (lambda: self.value) if kind == "function" else lambda: torch.tensor(self.value)
        )

    def now(self) -> float:
        return 1.0 if self.kind == "disabled" else self.scaler.get_scale() if self.kind == "scaler" else self.value

    def double(self) -> None:
        self.value *= 2
        self.tensor.mul_(2)
        if self.kind == "scaler":
            self.scaler.scale(torch.ones(()))  # makes its tensor, if it has none yet
            self.scaler.update(self.value)


KINDS = ("scaler", "disabled", "function", "function of a tensor", "tensor")


def regularized(scale: Any) -> RewrittenModule:
    torch.manual_seed(0)
    return graphreg.regularize(nn.Sequential(nn.Linear(4, 4)), weight_l2=1.0, penalties="attach", scale=scale)


def factor(call: Callable[[Tensor], Tensor], module: RewrittenModule) -> float:
    """What the gradient of the penalty is multiplied by in a call."""
    module.zero_grad()
    (call(X) * 0).sum().backward()
    weight = module.get_parameter("0.weight")
    assert weight.grad is not None
    return float((weight.grad / (2 * weight.detach() / weight.numel())).mean())


@pytest.mark.parametrize("way", ["module.compile", "torch.compile"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_scale_is_that_of_the_call_in_one_graph(kind: str, way: str) -> None:
    torch._dynamo.reset()
    counter, told = CompileCounterWithBackend("eager"), Told(kind)
    module = regularized(told.scale)
    call: Any = module
    if way == "torch.compile":
        call = torch.compile(module, backend=counter, fullgraph=True)
    else:
        module.compile(backend=counter, fullgraph=True)
    for _ in range(3):
        assert factor(call, module) == pytest.approx(told.now(), rel=1e-5)
        told.double()
    assert counter.frame_count == 1


@pytest.mark.parametrize(("kind", "graphs"), [("scaler", 2), ("disabled", 1), ("tensor", 1)])
def test_within_a_larger_function(kind: str, graphs: int) -> None:
    """Where Dynamo looks: a scaler's first scale is no tensor yet."""
    torch._dynamo.reset()
    counter, told = CompileCounterWithBackend("aot_eager"), Told(kind)
    module = regularized(told.scale)
    call = torch.compile(lambda x: module(x) * 1.0, backend=counter, fullgraph=True)
    for _ in range(3):
        assert factor(call, module) == pytest.approx(told.now(), rel=1e-5)
        told.double()
    assert counter.frame_count == graphs


def test_two_calls_before_a_backward_pass_keep_their_scales() -> None:
    told = Told("scaler")
    module = regularized(told.scale)
    first = module(X)
    told.double()
    ((first + module(X)) * 0).sum().backward()
    weight = module.get_parameter("0.weight")
    torch.testing.assert_close(weight.grad, (8 + 16) * 2 * weight.detach() / 16)


def test_a_copy_follows_the_same_scaler_and_a_pickle_the_one_beside_it() -> None:
    told = Told("scaler")
    module = regularized(told.scale)
    twin = copy.deepcopy(module)
    told.double()
    assert factor(twin, twin) == factor(module, module) == pytest.approx(16)
    loaded, scaler = pickle.loads(pickle.dumps((module, told.scaler)))
    scaler.scale(torch.ones(()))
    scaler.update(64.0)
    assert factor(loaded, loaded) == pytest.approx(64)


def test_the_scale_is_no_part_of_the_state_and_not_broadcast() -> None:
    module = regularized(Told("scaler").scale)
    assert list(module.state_dict()) == ["0.weight", "0.bias"]
    assert "graphreg_rules.attach.now" in module._ddp_params_and_buffers_to_ignore
    module.half().float()
    assert factor(module, module) == pytest.approx(8)
    assert not rules_of(module).get_submodule("attach").fed


@pytest.mark.parametrize("scale", [True, 0, -1.0, float("inf"), "2", lambda loss: 1.0])
def test_what_is_no_scale(scale: Any) -> None:
    with pytest.raises(graphreg.RegularizerError, match=r"scale=.* is not allowed; give a number above 0, a 0-d tensor, a GradScaler"):
        graphreg.regularize(torch.nn.Linear(2, 2), weight_l2=0.1, penalties="attach", scale=scale)


# Several forwards and one backward pass, as docs/training.md says


class OneLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(4, 2, bias=False)

    def forward(self, x: Tensor) -> Any:
        return self.fc(x)


class WithLoss(OneLayer):
    def forward(self, x: Tensor) -> Any:
        return {"loss": self.fc(x).square().mean()}


def of(output: Any) -> Any:
    return output["loss"] if isinstance(output, dict) else output.square().mean()


def without_gradient(run: Any, x: Tensor) -> Any:
    with torch.no_grad():
        return of(run(x))


Y = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
LOSSES: dict[str, Callable[[Any], Tensor]] = {
    "the sum of two losses": lambda run: of(run(X)) + of(run(Y)),
    "their mean": lambda run: (of(run(X)) + of(run(Y))) / 2,
    "one loss of two outputs": lambda run: (run(X) - run(Y)).square().mean(),
    "one forward of both batches": lambda run: of(run(torch.cat([X, Y]))),
    "a forward without gradients": lambda run: of(run(X)) + without_gradient(run, Y),
    "an output that is not used": lambda run: (run(Y), of(run(X)))[1],
}
WAYS: dict[str, Callable[[nn.Module], Any]] = {
    "flat": lambda model: graphreg.regularize(model, weight_l2=0.5, penalties="attach", scale=1),
    "loss": lambda model: graphreg.regularize(model, weight_l2=0.5, penalties="attach"),
    "in place": lambda model: graphreg.regularize_(model, weight_l2=0.5, scale=1),
    "half": lambda model: graphreg.regularize(model, weight_l2=0.5, penalties="attach", scale=0.5),
}


@pytest.mark.parametrize(
    ("way", "loss", "times"),
    [
        ("flat", "the sum of two losses", 2), ("flat", "their mean", 2), ("flat", "one loss of two outputs", 2),
        ("flat", "one forward of both batches", 1), ("flat", "a forward without gradients", 1), ("flat", "an output that is not used", 1),
        ("loss", "the sum of two losses", 2), ("loss", "their mean", 1), ("loss", "a forward without gradients", 1),
        ("in place", "one loss of two outputs", 2), ("half", "one loss of two outputs", 1),
    ],
)  # fmt: skip
def test_several_forwards_and_one_backward_pass(way: str, loss: str, times: int) -> None:
    """How often the penalty's gradient is in that of the loss."""
    kind = WithLoss if way == "loss" else OneLayer
    gradients = []
    for made in (WAYS[way], lambda model: model):
        model = kind()
        LOSSES[loss](made(model)).backward()
        gradients.append(model.fc.weight.grad)
    model = kind()
    graphreg.regularize(model, weight_l2=0.5)(X).penalties["weight_l2"].backward()
    assert gradients[0] is not None and gradients[1] is not None and model.fc.weight.grad is not None
    torch.testing.assert_close(gradients[0] - gradients[1], times * model.fc.weight.grad, rtol=1e-3, atol=1e-6)
