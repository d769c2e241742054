"""torch's parser of arguments asks a traced size for its number; the graph must not fix the size because of that."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphreg
from graphreg import GraphRegError


class Asks(nn.Module):
    def __init__(self, way: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.lin, self.way = nn.Linear(4, 4), way

    def forward(self, x: Tensor) -> Tensor:
        return self.way(self.lin(x).transpose(1, 2))


FREE: dict[str, Callable[[Tensor], Tensor]] = {
    "pool": lambda h: F.avg_pool1d(h, h.size(2)),  # as in a CNN for texts
    "two sizes": lambda h: F.avg_pool2d(h[:, None], (h.shape[1], h.shape[2])),
    "fft": lambda h: torch.fft.irfft(torch.fft.rfft(h), n=h.shape[-1]),
    "computed": lambda h: torch.narrow(h, 2, 1, h.size(2) - 2),
}
FIXED: dict[str, Callable[[Tensor], Tensor]] = {
    "range": lambda h: sum((h[..., i] for i in range(h.size(2))), h[..., 0]),
    "beside": lambda h: F.avg_pool1d(h, len(range(h.size(2)))),
    "before": lambda h: F.avg_pool1d(h * [1.0, 2.0][h.size(2) > 5], h.size(2)),
}


@pytest.mark.parametrize("way", FREE)
def test_a_size_that_an_operation_takes_is_free(way: str) -> None:
    model, x = Asks(FREE[way]), torch.randn(2, 5, 4)
    module = graphreg.regularize(model, dropout={"lin": 0.0}, example_inputs=x)
    assert "decided" not in module.code
    placed = graphreg.regularize_(Asks(FREE[way]), dropout={"lin": 0.0})
    placed.load_state_dict(model.state_dict())
    for length in (5, 7, 9, 3):
        z = torch.randn(2, length, 4)
        assert torch.equal(module(z).output, model(z)) and torch.equal(placed(z), model(z))
    assert len(vars(placed)["graphreg_in_place"]._made) == 1


@pytest.mark.parametrize("way", FIXED)
def test_a_size_that_the_code_itself_asks_for_is_asserted(way: str) -> None:
    model, x = Asks(FIXED[way]), torch.randn(2, 5, 4)
    module = graphreg.regularize(model, dropout={"lin": 0.0}, example_inputs=x)
    assert torch.equal(module(x).output, model(x))
    with pytest.raises(GraphRegError, match="the model decides something on a shape"):
        module(torch.randn(2, 7, 4))
