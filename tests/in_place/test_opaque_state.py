"""State that an opaque submodule keeps, and what a forward wrote before it raised."""

from __future__ import annotations

import collections
import copy
import logging
from typing import Any

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


class Importer:
    """As transformers imports lazily: its attribute is no module's."""

    def __init__(self, names: list[str]) -> None:
        self._modules = set(names)
        self._buffers = {}
        self._buffers["n"] = len(names)


class Decides(nn.Module):
    """Opaque; its code reaches what assigns attributes with the names that a module's own have."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.calls = nn.Linear(4, 4), 0

    def forward(self, x: Tensor) -> Tensor:
        if float(x.sum()) > 1e9:
            Importer(["torch"])
        self.calls += 1
        return self.layer(x)


@pytest.mark.parametrize("in_place", [True, False])
def test_attributes_of_other_classes_with_the_names_of_a_modules_own(in_place: bool) -> None:
    """BLIP and its like were left without submodules."""
    model: Any = nn.Sequential(nn.Linear(4, 4), Decides(), nn.ReLU(), nn.Linear(4, 2))
    plain, x = copy.deepcopy(model), torch.ones(2, 4)
    ours = graphreg.regularize_(model, weight_l2=0.0, scale=1) if in_place else graphreg.regularize(model, weight_l2=0.0)
    given = ours(x)
    assert torch.equal(given if in_place else given.output, plain(x))
    assert list(model[1]._modules) == ["layer"] and type(model[1]._buffers) is type(plain[1]._buffers)
