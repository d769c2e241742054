"""Checks of shapes that a model makes itself: where the trace cannot know, they are assumed to pass, and the graph checks that."""

from __future__ import annotations

import pytest
import torch
from checking_models import Branches, Catches, Checks
from torch import Tensor, nn

import graphreg
from graphreg.errors import OtherInputs

X = torch.randn(3, 4).abs()


def test_they_are_assumed_to_pass_and_asserted() -> None:
    model = Checks()
    traced = graphreg.trace(model, front_end="symbolic")
    graph = traced.graphs["both"]
    asserted = [node.args[1:] for node in graph.nodes if getattr(node.target, "__name__", "") == "has_passed"]
    assert [(expected, place.rpartition("/")[2]) for expected, place in asserted] == [
        (True, "checking_models.py:14"), (False, "checking_models.py:15"), (True, "checking_models.py:17"),
        (True, "checking_models.py:17"), (False, "checking_models.py:18"), (False, "checking_models.py:18"),
    ]  # fmt: skip


@pytest.mark.parametrize("compiled", [False, True])
def test_inputs_that_fail_them_are_refused(compiled: bool) -> None:
    model = Checks()
    module = graphreg.regularize(model, weight_l2=1e-3)
    run = torch.compile(module, backend="eager", fullgraph=True) if compiled else module
    for x in (X, torch.randn(5, 4)):
        assert torch.equal(run(x)[0], model(x))
    for wrong in (torch.randn(12, 4), torch.randn(3, 4)[:0], torch.randn(4)):
        with pytest.raises((AssertionError, RuntimeError, ValueError)):
            model(wrong)
        with pytest.raises(OtherInputs, match=r"fail a check of the model's own \(.*checking_models.py:\d+\)"):
            module(wrong)


@pytest.mark.parametrize("example_inputs", [None, X])
def test_checks_of_values(example_inputs: Tensor | None) -> None:
    module = graphreg.regularize(Branches(1), example_inputs=example_inputs, front_end="symbolic", weight_l2=1e-3)
    assert torch.equal(module(X.abs())[0], Branches.forward(module, X.abs()))
    with pytest.raises(OtherInputs, match="fail a check of the model's own"):
        module(-X.abs())


@pytest.mark.parametrize("model", [Catches(), Branches(0), Branches(2)])
def test_others_need_inputs(model: nn.Module) -> None:
    with pytest.raises(graphreg.TraceError, match="control flow"):
        graphreg.trace(model, front_end="symbolic")


def test_with_inputs_their_answer_is_known() -> None:
    graph = graphreg.trace(Checks(), X, front_end="symbolic").graphs["both"]
    assert not [node for node in graph.nodes if getattr(node.target, "__name__", "") == "has_passed"]


class TorchChecks(nn.Module):
    """Checks by functions of torch, in a submodule, too."""

    def __init__(self, inner: nn.Module | None = None) -> None:
        super().__init__()
        self.layer, self.inner = nn.Linear(4, 4), inner

    def forward(self, x: Tensor) -> Tensor:
        torch._check(x.shape[0] < 6, lambda: "too many rows")
        torch._check_value(x.dim() == 2)
        torch._check_tensor_all(x < 9)
        return self.layer(x if self.inner is None else self.inner(x))  # type: ignore[no-any-return]


@pytest.mark.parametrize("example_inputs", [None, X])
def test_checks_by_functions_of_torch(example_inputs: Tensor | None) -> None:
    model = TorchChecks(TorchChecks())
    module = graphreg.regularize(model, example_inputs=example_inputs, front_end="symbolic", weight_l2=1e-3)
    assert not [note for note in graphreg.report(module).notes if "opaque" in note]
    for size in (3, 5):
        x = torch.randn(size, 4)
        assert torch.equal(module(x).output, model(x))
    for wrong in (torch.randn(6, 4), torch.full((3, 4), 9.0)):
        with pytest.raises(OtherInputs, match=r"fail a check of the model's own \(.*test_own_checks.py:\d+\)"):
            module(wrong)


def test_a_check_that_fails_for_the_example_inputs_raises_its_error() -> None:
    with pytest.raises(RuntimeError, match="too many rows"):
        graphreg.regularize(TorchChecks(), example_inputs=torch.randn(7, 4), weight_l2=1e-3)


class Sampling(nn.Module):
    """torch's distributions check their arguments: ``if not valid.all(): raise``."""

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.spread = nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        sample: Tensor = torch.distributions.Normal(self.mean(x), self.spread(x).exp()).rsample()
        return sample


def test_checks_of_values_compile() -> None:
    torch.manual_seed(0)
    model = Sampling()
    validates = torch.distributions.Distribution._validate_args
    try:
        torch.distributions.Distribution.set_default_validate_args(True)  # Dynamo switches it off for the process
        eager, compiled = (graphreg.regularize(model, example_inputs=X, weight_l2=1e-3) for _ in range(2))
    finally:
        torch.distributions.Distribution.set_default_validate_args(validates)
    # torch 2.15 itself makes the check an operation
    with pytest.raises((OtherInputs, RuntimeError), match="check of the model's own|to satisfy its distribution constraint"):
        eager(X * float("nan"))
    torch.manual_seed(1)
    expected = eager(X).output
    torch.manual_seed(1)
    run = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(X).output, expected)
    with pytest.raises(RuntimeError, match="check of the model's own|to satisfy its distribution constraint"):
        run(X * float("nan"))
