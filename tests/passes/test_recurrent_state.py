from __future__ import annotations

import pytest
import torch
from torch import nn

import graphreg
from given_steps import ONES, Given, GivenWithLengths, Unrolled
from graphreg.passes import RecurrentState
from two_layers import number, text


def test_before_and_after() -> None:
    module = graphreg.regularize(Given(), recurrent_state={"weight": 1.0, "pattern": "mul"})
    assert (
        text(module.code)
        == """z = self.z
mul = x * z
mul_recurrent_state = self.graphreg_rules.mul_recurrent_state(mul)
head = self.head(mul)
recurrent_state = self.graphreg_rules.recurrent_state(mul_recurrent_state)
return graphreg_Regularized(head, {'recurrent_state': recurrent_state})"""
    )
    assert text(graphreg.strip(module).code) == "z = self.z\nmul = x * z\nhead = self.head(mul)\nreturn head"


def test_by_hand() -> None:
    """Differences (-3, -4), (1, 0) and (0, 2), (4, 0): (9 + 16 + 1 + 4 + 16) / 8."""
    penalty = graphreg.regularize(Given(), RecurrentState("mul", 0.5))(ONES).penalties["recurrent_state"]
    assert number(penalty) == 0.5 * 46 / 8
    assert penalty.dim() == 0


def test_gradient_by_hand() -> None:
    """Of a pair a, b: (b - a) / 4 for b and -(b - a) / 4 for a."""
    model = Given()
    graphreg.regularize(model, RecurrentState("mul", 1.0))(ONES).penalties["recurrent_state"].backward()
    gradient = [[[0.75, 1], [-0.75 - 0.25, -1], [0.25, 0]], [[0, -0.5], [-1, 0.5], [1, 0]]]
    assert torch.equal(model.z.grad, torch.tensor(gradient))
    assert model.head.weight.grad is None


def test_lengths_by_hand() -> None:
    """Lengths 3 and 2 leave three pairs of two units: (9 + 16 + 1 + 4) / 6; the last step has no gradient."""
    model = GivenWithLengths()
    module = graphreg.regularize(model, RecurrentState("mul", 1.0, lengths="lengths"))
    penalty = module(ONES, torch.tensor([3, 2])).penalties["recurrent_state"]
    assert number(penalty) == 5.0
    penalty.backward()
    torch.testing.assert_close(model.z.grad[1], torch.tensor([[0, -2 / 3], [0, 2 / 3], [0, 0]]))


def test_the_axis_of_time_by_hand() -> None:
    """With time first, two steps of three sequences: differences (-3, -3), (0, 3), (3, 3). Over the units: 1, 0, -1 and 1, 3, -1."""
    module = graphreg.regularize(Given(), RecurrentState("mul", 1.0, time_axis=0))
    assert number(module(ONES).penalties["recurrent_state"]) == (9 + 9 + 0 + 9 + 9 + 9) / 6
    module = graphreg.regularize(Given(), RecurrentState("mul", 1.0, time_axis=-1))
    assert number(module(ONES).penalties["recurrent_state"]) == pytest.approx((1 + 0 + 1 + 1 + 9 + 1) / 6)


def test_a_cell_by_hand() -> None:
    """h = 2 h + x from x = (1, 0), (0, 1), (1, 1): (1, 0), (2, 1), (5, 3)."""
    module = graphreg.regularize(Unrolled(), RecurrentState("cell", 1.0))
    x = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]])
    assert number(module(x).penalties["recurrent_state"]) == (1 + 1 + 9 + 4) / 4


def test_what_must_not_change() -> None:
    model = Given()
    module = graphreg.regularize(model, RecurrentState("mul", 1.0))
    assert list(module.state_dict()) == list(model.state_dict())
    for mode in (True, False):  # a penalty is the same in both modes
        assert torch.equal(module.train(mode)(ONES).output, model(ONES))
        assert number(module(ONES).penalties["recurrent_state"]) == 5.75


def test_errors() -> None:
    with pytest.raises(graphreg.RegularizerError, match="RecurrentState: weight=-1.0 is not allowed; weight must be 0 or more"):
        RecurrentState("rnn", -1)
    with pytest.raises(graphreg.RegularizerError, match="RecurrentState has no option 'norm'"):
        RecurrentState("rnn", 0.1, norm="l2")  # type: ignore[call-arg]
    sentence = r"RecurrentState needs a selector: '\*' does not say which values are sequences\. Give recurrent_state="
    for without in (lambda: RecurrentState("*", 0.1), lambda: graphreg.regularize(nn.Linear(2, 2), recurrent_state=0.1)):
        with pytest.raises(graphreg.RegularizerError, match=sentence):
            without()
