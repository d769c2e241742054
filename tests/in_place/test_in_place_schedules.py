"""Several structures in place have one schedule and one set of strengths: each call is that of a module made for it, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_in_place import ASKED, CALLS, Separate, X, equal, gradients, net

import graphreg
from graphreg import schedules

RISING: dict[str, Any] = {
    "hidden_dropout": schedules.linear(0.1, 0.7, 8), "weight_l2": schedules.piecewise({0: 0.0, 3: 0.5, 7: 2.0}),
    "hidden_l1": schedules.cosine(0.5, 0.0, 6),
}  # fmt: skip
ASKED_OF: dict[str, dict[str, Any]] = {
    "schedules": ASKED | RISING,
    "every second call": ASKED | {"hidden_dropout": schedules.linear(0.1, 0.7, 4, every=2)},
    "strengths": ASKED,
    "both": ASKED | {"hidden_dropout": RISING["hidden_dropout"]},
}


@pytest.mark.parametrize("kind", ASKED_OF)
def test_each_structure_has_the_strengths_of_its_call(kind: str) -> None:
    asked, (model, other) = ASKED_OF[kind], (net(), net())
    separate = Separate(other, **asked)
    graphreg.regularize_(model, **asked)
    rates = []
    for number, call in enumerate(CALLS * 2):
        if kind in ("strengths", "both") and number in (1, 4, 6):  # before a structure is traced, and after
            separate.strengths["weight_l2"] = 0.2 * number
            graphreg.set_strength(model, "weight_l2", 0.2 * number)
        if kind == "both" and number == 7:
            separate.strengths["hidden_dropout"] = 0.8
            graphreg.set_strength(model, "hidden_dropout", 0.8)
        for each in (model, other):
            each.zero_grad()
        ours, theirs = model(**call), separate(**call)
        assert torch.equal(ours, theirs)
        ours.square().mean().backward()
        theirs.square().mean().backward()
        assert equal(gradients(model), gradients(other))
        for each in (model, other):
            torch.optim.SGD(each.parameters(), lr=0.01).step()
        rates.append(graphreg.strengths(model))
        model.eval()(X), model.train()  # is no call of the schedule
    assert rates[0] != rates[-1]
    assert graphreg.rng_state(model).get("clock", 10) == graphreg.rng_state(model)["call"] == len(CALLS) * 2
