"""State that an opaque submodule keeps, and what a forward wrote before it raised."""

from __future__ import annotations

import collections
import copy
import logging

import pytest
import torch
from torch import Tensor, nn

import graphreg


class Queue(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.l, self.last = nn.Linear(4, 4), None
        self.queue: collections.deque[float] = collections.deque(maxlen=3)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.l(x)
        self.queue.append(h.detach().mean().item())
        self.last = h
        return h + len(self.queue)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block, self.out = Queue(), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.block(x))


def test_what_an_opaque_module_changes_is_no_change_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(logging.getLogger("graphreg"), "info", lambda text, *args: lines.append(text % args))
    plain = Net()
    model = graphreg.regularize_(copy.deepcopy(plain), weight_l2=0.0, scale=1)
    for n in (3, 3, 2, 3):
        x = torch.randn(n, 4)
        assert torch.equal(model(x), plain(x))
        assert list(model.block.queue) == list(plain.block.queue)
    assert not [line for line in lines if line.startswith("traced once more")]


def test_a_model_that_keeps_a_value_with_a_gradient_can_be_traced() -> None:
    model, x = Net(), torch.randn(3, 4)
    model(x)
    plain = copy.deepcopy(model, {id(model.block.last): None})
    graphreg.regularize_(model, weight_l2=0.0, scale=1)
    assert torch.equal(model(x), plain(x))


class Refusing(nn.Module):
    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.l, self.calls = nn.Linear(4, 4), 0
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen.add_(1)
        if x.shape[0] == 1:
            raise ValueError("a batch of one")
        return self.l(x)


def test_what_a_call_wrote_before_it_raised_stays() -> None:
    plain = Refusing()
    model = graphreg.regularize_(copy.deepcopy(plain), weight_l2=0.0, scale=1)
    for n in (1, 3, 1, 1, 2):
        for each in (plain, model):
            if n == 1:
                with pytest.raises(ValueError, match="a batch of one"):
                    each(torch.ones(1, 4))
            else:
                each(torch.ones(n, 4))
        assert model.seen == plain.seen
