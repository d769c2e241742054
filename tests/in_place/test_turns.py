"""A model in place, called by several threads: a call runs beside other calls, and none beside a trace."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphreg
from graphreg.in_place.turns import begin_turn, end_turn, tracing_turn

X = torch.ones(2, 4)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 32), nn.Linear(32, 2)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        h = self.a(x).relu()
        return self.b(h if mask is None else h * mask)


@pytest.fixture(autouse=True)
def restless() -> Iterator[None]:
    """Python changes threads as often as it can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def together(*works: Callable[[], Any]) -> list[Any]:
    """What each returns, begun together; an error of any is raised."""
    found, barrier = [None] * len(works), threading.Barrier(len(works))

    def run(i: int) -> None:
        barrier.wait(20)
        try:
            found[i] = works[i]()
        except BaseException as error:
            found[i] = error  # type: ignore[call-overload]

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    for each in found:
        if isinstance(each, BaseException):
            raise each
    return found


@pytest.mark.parametrize("arguments", [[(X,)] * 6, [(X,), (X, torch.ones(2, 32))] * 3], ids=["one structure", "two structures"])
def test_first_calls_that_come_together_draw_as_many_masks_as_are_counted(arguments: list[tuple[Tensor, ...]]) -> None:
    """Each trace puts the model's own class back for a while; calls then ran the plain forward, and traced it once more each."""
    for seed in range(3):
        torch.manual_seed(seed)
        model = graphreg.regularize_(Net(), hidden_dropout=0.5, rng=seed)
        found = [tuple(each.flatten().tolist()) for each in together(*[partial(model, *given) for given in arguments])]
        assert len(set(found)) == graphreg.rng_state(model)["call"] == 6
        assert len(vars(model)["graphreg_in_place"]._made) == len({len(each) for each in arguments})
        alone = graphreg.regularize_(Net(), hidden_dropout=0.5, rng=seed)
        alone.load_state_dict(model.state_dict())
        if len({len(each) for each in arguments}) == 1:
            assert {tuple(alone(X).flatten().tolist()) for _ in range(6)} == set(found)


def test_no_call_runs_the_plain_forward_while_another_thread_traces() -> None:
    model = graphreg.regularize_(Net(), hidden_dropout=0.5, rng=0, example_inputs=X)
    plain, entered, go = model.eval()(X), threading.Event(), threading.Event()
    model.train()

    class Slow(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            entered.set()
            go.wait(2)
            return x

    def other() -> Tensor:
        entered.wait(20)
        try:
            return model(X)
        finally:
            go.set()

    model.b = nn.Sequential(Slow(), model.b)  # the next call traces once more
    _, found = together(lambda: model(X), other)
    assert not torch.equal(found, plain) and graphreg.rng_state(model)["call"] == 2


def test_turns_wait_for_each_other_and_not_for_ever() -> None:
    """Two threads, each in a call of one model, trace the other's; a third begins and ends calls."""
    one, two, order = object(), object(), []

    def nested(mine: object, other: object) -> None:
        for _ in range(50):
            begin_turn(mine)
            try:
                with tracing_turn(other):
                    order.append("in")
                    with tracing_turn(mine):
                        pass
                    order.append("out")
            finally:
                end_turn()

    def calls() -> None:
        for _ in range(200):
            begin_turn(one)
            begin_turn(two)
            end_turn()
            end_turn()

    together(lambda: nested(one, two), lambda: nested(two, one), calls)
    assert order == ["in", "out"] * 100
