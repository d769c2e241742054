"""A forward that assigns a new tensor to a buffer (``self.avg = ...``): its graph assigns, too, and leaves the old tensor as it was."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphreg

X = torch.randn(3, 4)


class Average(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.l = nn.Linear(4, 4)
        self.register_buffer("avg", torch.ones(4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self.avg.add_(0)  # a write in place stays one
        h, old = self.l(x), self.avg
        y = h * self.avg
        self.avg = 0.9 * self.avg + 0.1 * h.detach().mean(0)
        return y - self.avg, old, self.avg


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.l = nn.GRUCell(4, 4), nn.Linear(4, 2)
        self.register_buffer("h", torch.zeros(3, 4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.cell(x, self.h)
        self.h = h.detach()
        return self.l(h), self.h


def both(model: nn.Module) -> list[nn.Module]:
    """The model, regularized in place and as a module."""
    placed = graphreg.regularize_(copy.deepcopy(model), hidden_dropout=0.0)
    return [placed, graphreg.regularize(copy.deepcopy(model), hidden_dropout=0.0, example_inputs=X, penalties="attach", scale=1)]


class Old(nn.Module):
    """Returns the buffer as it was, and does not read it for anything else."""

    def __init__(self) -> None:
        super().__init__()
        self.l = nn.Linear(4, 4)
        self.register_buffer("last", torch.zeros(4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        old, h = self.last, self.l(x)
        self.last = h.detach().mean(0)
        return h, old


@pytest.mark.parametrize("kind", [Average, Recurrent])
def test_it_is_assigned_and_what_was_kept_or_saved_stays(kind: type[nn.Module]) -> None:
    plain = kind()

    def trained(model: Any) -> list[Tensor]:
        kept = [*model.buffers()][:1]
        for i in range(3):
            outputs = model(X + i)
            outputs[0].sum().backward()  # reads what the forward computed with, also the old buffer
            kept += outputs
        return [*kept, *[*model.buffers()][:1], *(p.grad for p in model.parameters())]

    placed, module = both(plain)
    expected = trained(plain)
    for each in (placed, module):
        assert all(torch.allclose(a, b) for a, b in zip(trained(each), expected, strict=True))
    assert "copy_" not in module.code and ("add_" in module.code) == (kind is Average) and "assign_buffer" in module.code


class Keeps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.l = nn.Linear(4, 4)
        self.register_buffer("last", torch.zeros(3, 4))

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.l(x)
        self.last = h.detach()
        return h


def test_another_shape_is_refused() -> None:
    for each in both(Keeps()):
        each(X)
        with pytest.raises(graphreg.GraphRegError, match=r"assigns to its buffer 'last', of shape \(3, 4\).* a tensor of shape \(2, 4\)"):
            each(X[:2])


def test_exported_programs_update_it() -> None:
    plain = Old()
    module = graphreg.regularize(plain, hidden_dropout=0.0, example_inputs=X, penalties="attach", scale=1).eval()
    program = torch.export.export(module, (X,)).module()
    program(X)
    assert torch.allclose(program(X)[1], plain.l(X).mean(0))
