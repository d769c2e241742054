"""docs/selectors.md says which names, and so which masks, move when a model is edited."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import graphreg
from graphreg.passes import BernoulliDropout


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.fc(x) * 2.0)


class WithIdentity(Net):
    def __init__(self) -> None:
        super().__init__()
        self.same = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.same(self.fc(x)) * 2.0)


class WithOtherDeadCode(Net):
    def forward(self, x: Tensor) -> Tensor:
        h = self.fc(x)
        torch.sigmoid(h)
        return torch.tanh(h * 2.0)


class WithDeadCode(Net):
    def forward(self, x: Tensor) -> Tensor:
        h = self.fc(x)
        h * 3.0
        return torch.tanh(h * 2.0)


class Wrapped(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x)
        return out


def _wrapped_layer() -> nn.Module:
    net = Net()
    net.fc = Wrapped(net.fc)  # type: ignore[assignment]
    return net


def _mask(model: nn.Module, site: str) -> list[bool]:
    module = graphreg.regularize(model, BernoulliDropout(site, 0.5), example_inputs=torch.ones(1, 4), rng=3)
    return (module(torch.ones(1, 4)).output == 0).flatten().tolist()


@pytest.mark.parametrize(
    ("edited", "names", "moved"),
    [
        (WithIdentity, {"fc": "fc", "mul": "mul", "tanh": "tanh"}, set()),
        (WithOtherDeadCode, {"fc": "fc", "mul": "mul", "tanh": "tanh"}, set()),
        (WithDeadCode, {"fc": "fc", "mul": "mul_1", "tanh": "tanh"}, {"mul"}),
        (_wrapped_layer, {"fc": "fc", "mul": "mul", "tanh": "tanh"}, {"fc"}),
        (lambda: Wrapped(Net()), {"fc": "inner.fc", "mul": "inner.mul", "tanh": "inner.tanh"}, {"fc", "mul", "tanh"}),
    ],
    ids=["identity", "dead code", "dead code of a name that is there", "wrapped layer", "wrapped model"],
)
def test_as_the_page_says(edited: type[nn.Module], names: dict[str, str], moved: set[str]) -> None:
    for name, now in names.items():
        assert (_mask(Net(), name) != _mask(edited(), now)) == (name in moved), name
