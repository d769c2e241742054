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
