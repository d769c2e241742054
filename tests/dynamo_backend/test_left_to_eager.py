"""What torch.compile leaves to eager: a call without a graph is an error that names the code, and the cure in it works."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphreg
from graphreg import GraphRegError, NoMatchError
from graphreg.dynamo_backend import fallback as eager
from lacking import tells_skipped_code

# torch's own, where a graph's input is no leaf
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")


X = torch.ones(2, 4)


class Net(nn.Module):
    """A decision on data in a loop: torch.compile skips the forward whole."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.a(x))
        for _ in range(2):
            h = torch.relu(self.b(h)) if h.sum() > 0 else self.b(h)
        out: Tensor = self.c(h)
        return out


class Two(nn.Module):
    """A layer and its activation, in a forward of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(torch.relu(self.first(x)))
        return out


class Parts(nn.Module):
    """The same loop, with what it calls in submodules."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.within = Two(), Two()

    def forward(self, x: Tensor) -> Tensor:
        h = self.before(x)
        for _ in range(2):
            h = self.within(h) if h.sum() > -1e9 else h
        return h


LEAVES = (
    "If there is a graph break inside a loop, torch.compile runs the whole function, or all that remains of it, in eager. That "
    f"happened here: forward, {__file__}:{Net.forward.__code__.co_firstlineno}: Data-dependent branching. Avoid the break: replace a "
    "branch on a tensor's values by torch.where or a mask, or move the code before, inside and after the loop into submodules, each "
    "with a forward of its own."
)
WHY = LEAVES if tells_skipped_code() else "If you set TORCH_LOGS=graph_breaks, torch says why."
NOTHING = f"torch.compile captured no graph of Net, so nothing of it is regularized. {WHY}"


@pytest.mark.parametrize("by_name", [False, True])
def test_a_call_that_captures_nothing_is_an_error_each_time(by_name: bool) -> None:
    options: dict[str, Any] = {"inner": "eager", "hidden_dropout": 0.1}
    backend = graphreg.backend(**options)
    run = torch.compile(Net(), backend="graphreg", options=options) if by_name else torch.compile(Net(), backend=backend)
    for _ in range(2):
        with pytest.raises(GraphRegError, match=f"^{re.escape(NOTHING)}$"):
            run(X)


class Refines(Net):
    """The first call has a graph; a call that refines has none."""

    def forward(self, x: Tensor, refine: bool = False) -> Tensor:
        h = torch.relu(self.a(x))
        if refine:
            for _ in range(2):
                h = torch.relu(self.b(h)) if h.sum() > 0 else self.b(h)
        out: Tensor = self.c(h)
        return out


@pytest.mark.skipif(not tells_skipped_code(), reason="this torch does not tell which code it has left to eager")
def test_a_later_call_that_captures_nothing_is_an_error_in_train_mode() -> None:
    model = Refines()
    run = torch.compile(model, backend=graphreg.backend(inner="eager", hidden_dropout=0.1))
    run(X)
    for refine in (True, True, False):  # from then on, torch.compile leaves this function to eager
        with pytest.raises(GraphRegError, match="^torch.compile captured no graph of Refines, so nothing of it is regularized"):
            run(X, refine)
    model.eval()  # nothing would be regularized
    torch.testing.assert_close(run(X, True), model(X, True))
    assert torch._dynamo.config.fail_on_recompile_limit_hit is False  # what the backend begins with a call has ended, too


def test_an_error_of_the_models_own_stays_its_own() -> None:
    run = torch.compile(Net(), backend=graphreg.backend(inner="eager", hidden_dropout=0.1))
    with pytest.raises(Exception, match="reduction dim") as caught:
        run(torch.ones(2, 5))
    assert not isinstance(caught.value, GraphRegError)


def test_other_backends_are_left_alone() -> None:
    graphreg.backend(inner="eager", hidden_dropout=0.1)
    torch.compile(Net(), backend="eager")(X)


class Plain(nn.Linear):
    """A model that torch.compile takes whole."""


@pytest.mark.parametrize("error", [TypeError("unsupported operand"), KeyError("self"), GraphRegError("of ours")])
def test_what_fails_in_the_callback_stops_no_compilation(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    graphreg.backend(inner="eager", hidden_dropout=0.1)
    asked = list[int]()

    def failing() -> Any:
        asked.append(1)
        raise error

    monkeypatch.setattr(eager, "compiled_call", failing)
    model = Plain(4, 2)
    assert torch.equal(torch.compile(model, backend="eager")(X), model(X))
    assert asked
    run = torch.compile(Plain(4, 2), backend=graphreg.backend(inner="eager", weight_l1=1.0))  # an own one goes on without the watch
    run(X)
    assert graphreg.backend_of(run).penalties()["weight_l1"].item() > 0


def test_nothing_is_registered_before_there_is_a_backend() -> None:
    code = """
import torch
from torch._dynamo.callback import callback_handler
import graphreg.dynamo_backend.options, graphreg.dynamo_backend.backend, graphreg.dynamo_backend.fallback
from graphreg import GraphRegError

assert callback_handler.start_callbacks == []


class Left(torch.nn.Module):
    def forward(self, x):
        for _ in range(2):
            x = torch.relu(x) if x.sum() > 0 else x
        return x


model, x = torch.nn.Linear(4, 2), torch.ones(3, 4)
assert torch.equal(torch.compile(model, backend="eager")(x), model(x))
assert callback_handler.start_callbacks == []
run = torch.compile(Left(), backend="graphreg", options={"inner": "eager", "output_dropout": 0.1})
assert len(callback_handler.start_callbacks) == 1
try:
    run(x)
except GraphRegError as error:
    assert "captured no graph of Left" in str(error), error
else:
    raise AssertionError("nothing of it was regularized, and nothing said so")
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


def test_what_the_error_advises_has_sites() -> None:
    backend = graphreg.backend(inner="eager", hidden_l1=1.0)
    run = torch.compile(Parts(), backend=backend)
    run(X)
    assert [edit.site.name for part in backend.subgraphs for edit in part.plan.edits] == ["before.relu", "before.second", "within.relu"]
    run(X)
    assert backend.penalties()["hidden_l1"].item() > 0


class Behind(Net):
    """The loop behind a break of its own: the code before it is captured."""

    def forward(self, x: Tensor) -> Tensor:
        h, steps = self.a(x), 0
        while h.abs().amax() > 1e-9 and steps < 3:
            h, steps = self.b(h), steps + 1
        out: Tensor = self.c(h)
        return out


def test_a_selector_that_finds_nothing_tells_of_it() -> None:
    run = torch.compile(Behind(), backend=graphreg.backend(inner="eager", hidden_dropout=0.1))
    with pytest.raises(NoMatchError, match="^Behind has none of the default sites") as caught:
        run(X)
    tells = re.search("the rest of forward, .*: Data-dependent branching", str(caught.value)) is not None
    assert tells is tells_skipped_code()
