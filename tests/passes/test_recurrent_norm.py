from __future__ import annotations

import pytest
import torch
from torch import nn

import graphreg
from given_steps import ONES, Given, GivenWithLengths, Unrolled
from graphreg.passes import RecurrentNorm
from two_layers import number, text


def test_before_and_after() -> None:
    model = GivenWithLengths()
    module = graphreg.regularize(model, recurrent_norm={"weight": 1.0, "pattern": "mul", "lengths": "lengths"})
    assert (
        text(module.code)
        == """z = self.z
mul = x * z
mul_recurrent_norm = self.graphreg_rules.mul_recurrent_norm(mul, lengths = lengths)
head = self.head(mul)
recurrent_norm = self.graphreg_rules.recurrent_norm(mul_recurrent_norm)
return graphreg_Regularized(head, {'recurrent_norm': recurrent_norm})"""
    )
    assert text(graphreg.strip(module).code) == "z = self.z\nmul = x * z\nhead = self.head(mul)\nreturn head"


def test_before_and_after_at_the_calls_of_a_cell() -> None:
    module = graphreg.regularize(Unrolled(), recurrent_norm={"weight": 1.0, "pattern": "cell"})
    after = text(module.code).splitlines()
    assert after[-4:] == [
        "cell_add_recurrent_norm = self.graphreg_rules.cell_add_recurrent_norm((add, add_1, add_2))",
        "head = self.head(add_2)",
        "recurrent_norm = self.graphreg_rules.recurrent_norm(cell_add_recurrent_norm)",
        "return graphreg_Regularized(head, {'recurrent_norm': recurrent_norm})",
    ]
    assert text(graphreg.strip(module).code).splitlines() == [*after[:-4], "head = self.head(add_2)", "return head"]


def test_by_hand() -> None:
    """Squared norms 25, 0, 1 and 1, 9, 25: (25² + 1² + 8² + 16²) / 4. Norms 5, 0, 1 and 1, 3, 5: (5² + 1² + 2² + 2²) / 4."""
    for norm, value in (("squared", 946 / 4), ("l2", 34 / 4)):
        module = graphreg.regularize(Given(), RecurrentNorm("mul", 0.5, norm=norm))
        penalty = module(ONES).penalties["recurrent_norm"]
        assert number(penalty) == 0.5 * value
        assert penalty.dim() == 0


def test_gradient_by_hand() -> None:
    """Of a pair a, b whose norms differ by n: squared, n b for b and -n a for a; l2, n b / 2|b| and -n a / 2|a|, at a zero state 0."""
    squared = [[[75, 100], [0, 0], [1, 0]], [[0, -8], [0, 24 - 48], [64, 48]]]
    l2 = [[[1.5, 2.0], [0, 0], [0.5, 0]], [[0, -1], [0, 1 - 1], [0.8, 0.6]]]
    for norm, gradient in (("squared", squared), ("l2", l2)):
        model = Given()
        graphreg.regularize(model, RecurrentNorm("mul", 1.0, norm=norm))(ONES).penalties["recurrent_norm"].backward()
        torch.testing.assert_close(model.z.grad, torch.tensor(gradient).float())
        assert model.head.weight.grad is None


def test_lengths_by_hand() -> None:
    """Lengths 3 and 2 leave three pairs: (25² + 1² + 8²) / 3 and (5² + 1² + 2²) / 3; the last step has no gradient."""
    for norm, value in (("squared", 230.0), ("l2", 10.0)):
        model = GivenWithLengths()
        module = graphreg.regularize(model, RecurrentNorm("mul", 1.0, norm=norm, lengths="lengths"))
        penalty = module(ONES, torch.tensor([3, 2])).penalties["recurrent_norm"]
        assert number(penalty) == value
        penalty.backward()
        assert model.z.grad[1, 2].tolist() == [0, 0]
        assert model.z.grad[1, 1].abs().sum() > 0


def test_a_cell_by_hand() -> None:
    """h = 2 h + x from x = (1, 0), (0, 1), (1, 1): (1, 0), (2, 1), (5, 3), squared norms 1, 5, 34."""
    module = graphreg.regularize(Unrolled(), RecurrentNorm("cell", 1.0))
    x = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]])
    assert number(module(x).penalties["recurrent_norm"]) == (4**2 + 29**2) / 2


def test_a_constant_norm_costs_nothing() -> None:
    """Whatever the state does on its sphere."""
    z = torch.nn.functional.normalize(torch.randn(4, 7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), dim=-1)
    for norm in ("squared", "l2"):
        module = graphreg.regularize(Given(z).double(), RecurrentNorm("mul", 1.0, norm=norm))
        assert number(module(torch.ones_like(z)).penalties["recurrent_norm"]) < 1e-30


def test_what_must_not_change() -> None:
    model = Given()
    module = graphreg.regularize(model, RecurrentNorm("mul", 1.0))
    assert list(module.state_dict()) == list(model.state_dict())
    for mode in (True, False):  # a penalty is the same in both modes
        assert torch.equal(module.train(mode)(ONES).output, model(ONES))
        assert number(module(ONES).penalties["recurrent_norm"]) == 236.5


def test_errors() -> None:
    with pytest.raises(graphreg.RegularizerError, match="RecurrentNorm: weight=-1.0 is not allowed; weight must be 0 or more"):
        RecurrentNorm("rnn", -1)
    with pytest.raises(graphreg.RegularizerError, match="RecurrentNorm: norm='l1' is not allowed; norm must be 'squared' or 'l2'"):
        RecurrentNorm("rnn", 0.1, norm="l1")
    sentence = (
        r"RecurrentNorm needs a selector: '\*' does not say which values are sequences\. Give recurrent_norm="
        r"\{'weight': 0\.1, 'pattern': 'rnn'\} or RecurrentNorm\('rnn', 0\.1\), with a name of your model in place of 'rnn'; "
        r"graphreg\.names\(model\) lists them\."
    )
    for without in (lambda: RecurrentNorm("*", 0.1), lambda: graphreg.regularize(nn.Linear(2, 2), recurrent_norm=0.1)):
        with pytest.raises(graphreg.RegularizerError, match=sentence):
            without()
