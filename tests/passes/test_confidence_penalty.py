from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Categorical

import graphreg
from graphreg.passes import ConfidencePenalty
from penalties import Classifier, agrees, before_and_after, nothing_else_changes, of, random, refused, same_compiled
from two_layers import TwoLayers, X

LOGITS = torch.tensor([[0.0, math.log(3)], [1.0, 1.0]])


def test_before_and_after() -> None:
    expected = """fc = self.fc(x)
fc_confidence = self.graphreg_rules.fc_confidence(fc)
confidence = self.graphreg_rules.confidence(fc_confidence)
return graphreg_Regularized(fc, {'confidence': confidence})"""
    before_and_after(expected, Classifier(), "fc = self.fc(x)\nreturn fc", confidence=1.0)


def test_by_hand() -> None:
    """p = (1/4, 3/4) and (1/2, 1/2)."""
    value = (0.25 * math.log(0.25) + 0.75 * math.log(0.75) + math.log(0.5)) / 2
    assert of(ConfidencePenalty("*", 0.5), Classifier(), LOGITS) == pytest.approx(0.5 * value)


def test_against_torch_and_differences() -> None:
    agrees(ConfidencePenalty("*", 1.0), lambda logits: -Categorical(logits=logits).entropy().mean(), random(5, 3))


def test_masked_classes_add_nothing() -> None:
    """A decoder or a policy sets the logits of classes that are not allowed to -inf."""
    logits, masked = random(5, 3).requires_grad_(), torch.tensor([False, True, False])
    found = ConfidencePenalty("*", 1.0)(logits.masked_fill(masked, -math.inf))
    expected = ConfidencePenalty("*", 1.0)(logits[:, ~masked])
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(value, logits)[0] for value in (found, expected)))


def test_logits_that_are_far_apart_have_a_gradient() -> None:
    logits = torch.tensor([[0.0, 1e4]], requires_grad=True)
    penalty = ConfidencePenalty("*", 1.0)(logits)
    penalty.backward()
    assert penalty == 0 and logits.grad is not None and logits.grad.isfinite().all()


@dataclass
class Output:
    loss: Tensor
    logits: Tensor


class WithLoss(Classifier):
    def __init__(self, form: str) -> None:
        super().__init__()
        self.form, self.layer = form, nn.CrossEntropyLoss()

    def forward(self, x: Tensor) -> Any:
        logits = self.fc(x)
        if self.form in ("by name", "in a dataclass"):
            return (dict if self.form == "by name" else Output)(loss=logits.square().mean(), logits=logits)
        return (F.cross_entropy if self.form == "by its function" else self.layer)(logits, logits.softmax(1)), logits


@pytest.mark.parametrize("form", ["by name", "by its function", "by its layer", "in a dataclass"])
def test_losses_are_left_out_of_the_default(form: str) -> None:
    model = WithLoss(form)
    plan = graphreg.plan(graphreg.trace(model), graphreg.from_kwargs(model, confidence=0.1, z_loss=0.1))
    assert [(edit.name, edit.site.name) for edit in plan.edits] == [("confidence", "fc"), ("z_loss", "fc")]


def test_segmentation_has_its_classes_on_the_channels() -> None:
    """The mean over pixels of the same sums: the classes are axis 1 of what a convolution gives."""
    model, x = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Upsample(scale_factor=2)), random(2, 3, 2, 2).float()
    found = of(ConfidencePenalty("**#output", 1.0), model, x)
    assert found == pytest.approx(-Categorical(logits=model(x).movedim(1, -1)).entropy().mean().item(), rel=1e-5)
    assert found != pytest.approx(of(ConfidencePenalty("**#output", 1.0, axis=-1), model, x), rel=1e-3)


def test_compiled() -> None:
    same_compiled(ConfidencePenalty("*", 0.5), Classifier(), LOGITS)


def test_what_must_not_change() -> None:
    nothing_else_changes(ConfidencePenalty("*", 0.5), Classifier(), LOGITS)


def test_errors() -> None:
    refused("ConfidencePenalty at b: the value has shape (2, 1), and so 1 unit (the units are the last axis); the penalty needs 2 or more.",
            lambda: graphreg.regularize(TwoLayers(), confidence=0.1)(X))  # fmt: skip
    refused("ConfidencePenalty at 1: the penalty takes logits, and this comes from a softmax. Select what the softmax reads.",
            lambda: graphreg.regularize(nn.Sequential(nn.Linear(2, 2), nn.Softmax(1)), confidence=0.1))  # fmt: skip

    class Loss(Classifier):
        def forward(self, x: Tensor) -> Tensor:
            return F.mse_loss(self.fc(x), x)

    with pytest.raises(graphreg.NoMatchError, match=r"default sites of ConfidencePenalty \(the outputs that no later layer reads, "):
        graphreg.regularize(Loss(), confidence=0.1)
