"""Submodules that are put into another mode than the model, after the trace: what they compute follows, or the call is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphreg
from graphreg.errors import OtherInputs

X = torch.randn(6, 4)


class Drop(nn.Module):
    """Its mode decides a literal."""

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.5, self.training)


class DropGiven(nn.Module):
    """Its mode decides nothing."""

    def forward(self, x: Tensor, training: bool) -> Tensor:
        return F.dropout(x, 0.5, training)


class Passes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.drop = DropGiven()

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(x, self.training)


class Path(nn.Module):
    """Its mode decides which operations there are."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rand_like(x[:, :1]).gt(0.3) / 0.7 if self.training else x


class Gives(nn.Module):
    """Its mode decides a number that its caller computes with."""

    def forward(self, x: Tensor) -> Any:
        return x, (0.1 if self.training else 0.7)


class Takes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = Gives()

    def forward(self, x: Tensor) -> Tensor:
        h, factor = self.gate(x)
        return h * factor  # type: ignore[no-any-return]


class Chooses(nn.Module):
    """Its mode decides which of two values it returns; the operations are the same."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        one, other = self.one(x), self.other(x)
        return one if self.training else other


class Picks(nn.Module):
    """Which of its two values it returns is decided by the mode of a submodule; the operations are the same."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.one, self.other = Gives(), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        h, factor = self.gate(x)
        one, other = self.one(h), self.other(h)
        return one if factor < 0.5 else other  # type: ignore[no-any-return]


class Keeps(nn.Module):
    """Its mode decides whether it takes what its submodule gives, which another mode decides."""

    def __init__(self) -> None:
        super().__init__()
        self.path = Path()

    def forward(self, x: Tensor) -> Tensor:
        y = self.path(x)
        return y if self.training else x  # type: ignore[no-any-return]


class Counts(nn.BatchNorm1d):
    """As timm's batch norm with activation: it counts its batches, and passes its mode on."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.num_batches_tracked.add_(1)  # type: ignore[union-attr]
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training)


class Net(nn.Module):
    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.first, self.parts, self.last = nn.Linear(4, 4), nn.ModuleList(parts), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        for part in self.parts:
            h = part(h)
        return self.last(h)


class InTrainMode(Net):
    """Its own mode decides about operations, too, and the second part runs in one mode alone."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.parts[0](self.first(x))
        return self.parts[1](self.last(h)) if self.training else h + 1


# The parts of the model, and those of them whose mode ``regularize`` cannot follow.
CASES: dict[str, tuple[Any, tuple[str, ...]]] = {
    "literals": (lambda: Net(Drop(), Drop()), ()),
    "passed on": (lambda: Net(Passes(), Drop()), ()),
    "a number that is returned": (lambda: Net(Takes(), nn.ReLU()), ()),
    "operations": (lambda: Net(Path(), Drop()), ("parts.0",)),
    "operations, and literals of others": (lambda: Net(Counts(4), Drop()), ("parts.0",)),
    "operations, and literals within": (lambda: Net(nn.Sequential(Drop(), Path()), Counts(4), Drop()), ("parts.0.1", "parts.1")),
    "operations, and a number that chooses": (lambda: Net(Picks(), Path()), ("parts.0.gate", "parts.1")),
    "a choice among what another gives": (lambda: Net(Keeps(), Path()), ("parts.0.path", "parts.1")),
    "a choice": (lambda: Net(Chooses(), Drop()), ("parts.0",)),
    "literals, and operations of the model": (lambda: InTrainMode(Drop(), Drop()), ()),
    "all": (lambda: InTrainMode(Path(), Passes()), ("parts.0", "parts.1")),
}
KINDS = {
    "regularize": lambda model: graphreg.regularize(model, weight_l2=1.0),
    "export": lambda model: graphreg.regularize(model, weight_l2=1.0, front_end="export", example_inputs=X),
    "in place": lambda model: graphreg.regularize_(model, weight_l2=1.0, scale=1),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES)
def test_each_part_alone_in_the_other_mode(case: str, kind: str) -> None:
    make, expected = CASES[case]
    plain, refused = make(), set[str]()
    ours = KINDS[kind](copy.deepcopy(plain))
    for training in (True, False):
        for path, part in plain.named_modules():
            if isinstance(part, nn.ModuleList):
                continue
            for model in (plain, ours):
                model.train(training)
                model.get_submodule(path).train(not training if path else training)
            torch.manual_seed(0)
            theirs = plain(X)
            torch.manual_seed(0)
            try:
                given = ours(X)
            except OtherInputs as error:
                named = str(error).removeprefix("the model's forward branches on self.").partition(".training, which is ")
                assert f"{named[0]}.".startswith(f"{path}.") and named[2].startswith(f"{not training} now.")
                refused.add(named[0])
                ours.load_state_dict(plain.state_dict())
            else:
                torch.testing.assert_close(given if isinstance(given, Tensor) else given.output, theirs)
    assert refused == (set() if kind == "in place" else {*expected})


def test_compiled_in_place() -> None:
    """Dynamo could not run another graph where the assertion fails, so the graph is chosen before."""
    torch._dynamo.reset()
    plain = Net(Path(), Drop())
    ours = torch.compile(graphreg.regularize_(copy.deepcopy(plain), weight_l2=1.0, scale=1), backend="eager", fullgraph=True)
    for training in (True, False, True):
        for model in (plain, ours):
            model.train()
            model.get_submodule("parts.0").train(training)
        torch.testing.assert_close(*(model(X) for model in (plain, ours) if torch.manual_seed(0)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_part_that_was_in_another_mode_during_the_trace(kind: str) -> None:
    plain = Net(Path(), Drop())
    plain.parts[0].eval()
    ours = KINDS[kind](copy.deepcopy(plain))
    given = [model(X) for model in (plain, ours) if torch.manual_seed(0)]
    torch.testing.assert_close(*(each if isinstance(each, Tensor) else each.output for each in given))
    ours.train()
    if kind == "in place":
        plain.train()
        torch.testing.assert_close(*(model(X) for model in (plain, ours) if torch.manual_seed(1)))
    else:
        with pytest.raises(
            OtherInputs, match=r"^the model's forward branches on self\.parts\.0\.training, which is True now\. .*with False"
        ):
            ours(X)
