"""A call of a backend that raises is not counted, neither its draws nor its step of the schedules."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import graphreg
from graphreg import schedules

X = torch.ones(2, 4)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fails = nn.Linear(4, 16), nn.Linear(16, 2), False

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).relu()
        torch._dynamo.graph_break()
        if self.fails:
            raise ZeroDivisionError
        return self.b(h).tanh()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo asks, behind a break
def test_a_call_that_raises_behind_a_graph_break_is_not_counted() -> None:
    torch.manual_seed(0)
    model = Net()
    backend = graphreg.backend(inner="aot_eager", hidden_dropout=schedules.linear(0.2, 0.8, 10), rng=0)
    compiled = torch.compile(model, backend=backend)
    compiled(X)
    before = graphreg.rng_state(backend)
    model.fails = True
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            compiled(X)
    model.fails = False
    assert graphreg.rng_state(backend) == before
    found = [compiled(X) for _ in range(2)]
    graphreg.set_rng_state(backend, before)
    assert all(torch.equal(compiled(X), each) for each in found)
