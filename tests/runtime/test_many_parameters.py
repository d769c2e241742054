"""A penalty on many parameters, for which eager code asks once what is the same for all, gives what it gives for each by itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphreg
from graphreg import Penalty
from graphreg.errors import RegularizerError

X = torch.linspace(-1, 1, 12).view(3, 4)


class Mixed(nn.Module):
    """Its weights have three dtypes, and one of them is a subclass of Parameter."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))
        self.in_double, self.in_bfloat16 = nn.Parameter(torch.randn(3, 5, dtype=torch.float64)), nn.Parameter(torch.randn(2, 3).bfloat16())
        self.own = type("Own", (nn.Parameter,), {})(torch.randn(2, 2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x + self.in_double.float().mean() + self.in_bfloat16.float().mean() + self.own.mean()


def weights(module: nn.Module) -> list[Tensor]:
    return [p for name, p in module.named_parameters() if p.dim() >= 2]


@pytest.mark.parametrize("context", ["plain", "autocast", "vmap", "compiled"])
def test_by_hand(context: str) -> None:
    module: Any = graphreg.regularize(Mixed(), weight_l2=0.5)
    parameters = weights(module)
    assert len(parameters) == 7
    call: Any = module
    if context == "compiled":
        call = torch.compile(module, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=context == "autocast"):
        for _ in range(2):
            if context == "vmap":
                total = torch.vmap(lambda x: module(x).penalties["weight_l2"], randomness="different")(X)[0]
            else:
                total = call(X).penalties["weight_l2"]
            wide = [p if p.dtype == torch.float64 else p.float() for p in parameters]
            expected = 0.5 * torch.stack([w.square().mean().double() for w in wide]).mean()
            torch.testing.assert_close(total.double(), expected)
            ours, theirs = (torch.autograd.grad(each, parameters) for each in (total, expected))
            torch.testing.assert_close(ours, theirs)
    torch.compiler.reset()


class ColumnsOfMany(Penalty, keys=("columns_of_many",), on="parameters"):
    """Gives a tensor that is not 0-d for one of the shapes."""

    def __call__(self, w: Tensor) -> Tensor:
        return w.sum(0) if w.shape == (3, 5) else w.sum()


def test_a_result_of_another_shape_is_refused_for_later_parameters_too() -> None:
    module = graphreg.regularize(Mixed(), ColumnsOfMany("*", 1.0))
    with pytest.raises(RegularizerError, match=r"gave a tensor of shape \(5,\)"):
        module(X)
