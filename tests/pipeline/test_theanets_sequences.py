"""theanets' recurrent numbers from other forms of its network: a cell called in a loop, nn.RNN; and what it says of itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphreg
from graphreg.passes import RecurrentNorm, RecurrentState
from theanets_nets import GOLDEN, NETWORKS, Telescoping, assert_close, gradients, inputs, network, tensor

CASES: dict[str, Any] = {case["id"]: case for case in GOLDEN["cases"]}
PARAMETERS: dict[str, Any] = NETWORKS["rnn"]["params"]


class Cell(nn.Module):
    """A step of theanets' RNN layer, with its parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.xh, self.hh, self.b = (nn.Parameter(tensor(PARAMETERS[f"hid1.{name}"])) for name in ("xh", "hh", "b"))

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return torch.tanh(x @ self.xh + self.b + h @ self.hh)


class Form(nn.Module):
    """The network ``rnn`` of the golden set, whose recurrent layer is ``hid1``; ``theirs``: its gradients in theanets' words."""

    def __init__(self) -> None:
        super().__init__()
        self.hid1, self.out = self.layer(), nn.Linear(4, 2, dtype=torch.float64)
        with torch.no_grad():
            self.out.weight.copy_(tensor(PARAMETERS["out.w"]).T)
            self.out.bias.copy_(tensor(PARAMETERS["out.b"]))

    def layer(self) -> nn.Module:
        raise NotImplementedError

    def theirs(self, gradient: Mapping[str, Tensor]) -> dict[str, Tensor]:
        raise NotImplementedError


class Looped(Form):
    def layer(self) -> nn.Module:
        return Cell()

    def forward(self, in_: Tensor) -> Tensor:
        h, steps = in_.new_zeros(5, 4), []
        for t in range(6):
            h = self.hid1(in_[:, t], h)
            steps.append(self.out(h))
        return torch.stack(steps, 1)

    def theirs(self, gradient: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: gradient[f"hid1.{name}"] for name in ("xh", "hh", "b")}


class TorchCell(Looped):
    """nn.RNNCell has the weights the other way round, and two biases."""

    def layer(self) -> nn.Module:
        return filled(nn.RNNCell(3, 4, dtype=torch.float64), "")

    def theirs(self, gradient: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return torch_gradients(gradient, "")


class BatchFirst(Form):
    def layer(self) -> nn.Module:
        return filled(nn.RNN(3, 4, batch_first=True, dtype=torch.float64), "_l0")

    def forward(self, in_: Tensor) -> Tensor:
        return self.out(self.hid1(in_)[0])

    def theirs(self, gradient: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return torch_gradients(gradient, "_l0")


class TimeFirst(BatchFirst):
    def layer(self) -> nn.Module:
        return filled(nn.RNN(3, 4, dtype=torch.float64), "_l0")

    def forward(self, in_: Tensor) -> Tensor:
        return self.out(self.hid1(in_.transpose(0, 1))[0]).transpose(0, 1)


def filled(layer: Any, suffix: str) -> nn.Module:
    with torch.no_grad():
        getattr(layer, f"weight_ih{suffix}").copy_(tensor(PARAMETERS["hid1.xh"]).T)
        getattr(layer, f"weight_hh{suffix}").copy_(tensor(PARAMETERS["hid1.hh"]).T)
        getattr(layer, f"bias_ih{suffix}").copy_(tensor(PARAMETERS["hid1.b"]))
        getattr(layer, f"bias_hh{suffix}").zero_()
    return layer


def torch_gradients(gradient: Mapping[str, Tensor], suffix: str) -> dict[str, Tensor]:
    weights = {name: gradient[f"hid1.weight_{'ih' if name == 'xh' else 'hh'}{suffix}"].T for name in ("xh", "hh")}
    return weights | {"b": gradient[f"hid1.bias_ih{suffix}"]}


FORMS = {"cell in a loop": Looped, "nn.RNNCell in a loop": TorchCell, "batch first": BatchFirst, "time first": TimeFirst}


@pytest.mark.parametrize(("case", "penalty"), [("recurrent-state/rnn", RecurrentState), ("recurrent-norm/rnn", Telescoping)])
@pytest.mark.parametrize("form", FORMS)
def test_a_form_of_the_network_agrees(form: str, case: str, penalty: Any) -> None:
    model, golden = FORMS[form](), CASES[case]["regularizers"][0]
    output, penalties = graphreg.regularize(model, penalty("hid1", 1.0))(*inputs("rnn"))
    (term,) = penalties.values()
    assert_close(output, NETWORKS["rnn"]["outputs"]["out:out"], "out:out")
    assert_close(term, golden["term"], case)
    ours = model.theirs(gradients(term, model))
    assert {f"hid1.{name}" for name in ours} == {name for name, gradient in golden["grad"].items() if gradient is not None}
    for name, gradient in ours.items():
        assert_close(gradient, golden["grad"][f"hid1.{name}"], name)


def test_the_documented_formula_and_the_papers() -> None:
    """What theanets' documentation and Krueger & Memisevic define, as numpy computed it on theanets' values."""
    golden = GOLDEN["observed"]["recurrent-norm-vs-doc"]
    for norm, fact in (("squared", "doc_squared_difference_of_squared_norms_mean"), ("l2", "paper_squared_difference_of_norms_mean")):
        module = graphreg.regularize(network(golden["network"]), RecurrentNorm("hid1", 1.0, norm=norm))
        assert_close(module(*inputs(golden["network"])).penalties["recurrent_norm"], golden[fact], fact)
    golden = GOLDEN["observed"]["recurrent-state-vs-doc"]
    module = graphreg.regularize(network(golden["network"]), RecurrentState("hid1", 1.0))
    assert_close(module(*inputs(golden["network"])).penalties["recurrent_state"], golden["numpy_mean_all"], "numpy_mean_all")


@pytest.mark.parametrize("penalty", [RecurrentNorm, RecurrentState])
def test_neighbouring_units_are_no_steps(penalty: Any) -> None:
    """Row.SEQUENCES, of a value of 2 dims: theanets' state penalty takes units for steps, its norm penalty fails in numpy."""
    golden = GOLDEN["observed"]["recurrent-state-2d"]
    (x,) = inputs(golden["network"])
    hid1 = tensor(NETWORKS[golden["network"]]["outputs"]["hid1:out"])
    assert_close((hid1[:, 1:] - hid1[:, :-1]).square().mean(), golden["numpy"], "theanets' value")
    sentence = r"at hid1.tanh: the value has shape \(\d+, 5\) and is no sequence: a sequence is \[batch, time, units\], 3 dims or more"
    with pytest.raises(graphreg.RegularizerError, match=sentence):
        graphreg.regularize(network(golden["network"]), penalty("hid1", 1.0), example_inputs=x)
    with pytest.raises(graphreg.RegularizerError, match=sentence):
        graphreg.regularize(network(golden["network"]), penalty("hid1", 1.0))(x)


def test_a_selector_is_asked_for() -> None:
    """theanets' documentation says that one must be given; its code takes every output, also those that are no sequence."""
    assert GOLDEN["observed"]["recurrent-scalar-does-not-raise"]["ok"]
    with pytest.raises(graphreg.RegularizerError, match="RecurrentNorm needs a selector"):
        graphreg.regularize(network("rnn"), recurrent_norm=0.3)
