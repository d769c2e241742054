"""Models that are split into stages, and the stages."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """A residual block with dropout of its own."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.up, self.down, self.drop = nn.Linear(8, 12), nn.Linear(12, 8), nn.Dropout(rate)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.down(torch.relu(self.up(x))))  # type: ignore[no-any-return]


class Net(nn.Module):
    """Four blocks between two layers. A stage is a copy from which layers are deleted, as in the guides for pipelines."""

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        self.first: nn.Module | None = nn.Linear(4, 8)
        self.layers = nn.ModuleDict({str(i): Block(rate) for i in range(4)})
        self.last: nn.Module | None = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        if self.first is not None:
            x = torch.tanh(self.first(x))
        for layer in self.layers.values():
            x = layer(x)
        return self.last(torch.relu(x)) if self.last is not None else x


def net(rate: float = 0.0) -> Net:
    """The model with the given rate of the dropout that it has itself."""
    torch.manual_seed(0)
    return Net(rate).double()


def stage_of(whole: Net, index: int, stages: int = 2) -> Net:
    """The stage of this number: a copy of the whole model without the layers of the others."""
    stage, each = copy.deepcopy(whole), 4 // stages
    for name in list(stage.layers):
        if int(name) // each != index:
            del stage.layers[name]
    if index > 0:
        stage.first = None
    if index < stages - 1:
        stage.last = None
    return stage


class Tied(nn.Module):
    """An embedding whose table is the head's weight, too."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding: nn.Module | None = nn.Embedding(11, 8)
        self.middle: nn.Module | None = nn.Linear(8, 8)
        self.head: nn.Linear | None = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        if self.embedding is not None and self.middle is not None:
            x = torch.tanh(self.middle(self.embedding(x)))
        return self.head(torch.relu(x)) if self.head is not None else x


class Functions(nn.Module):
    """Functions between layers, numbered through the model: a stage alone would begin to count anew."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(6, 6) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.c(F.relu(self.b(F.relu(self.a(x))))))


class FirstFunctions(nn.Module):
    def __init__(self, whole: Functions) -> None:
        super().__init__()
        self.a = copy.deepcopy(whole.a)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x)  # type: ignore[no-any-return]


class LastFunctions(nn.Module):
    def __init__(self, whole: Functions) -> None:
        super().__init__()
        self.b, self.c = copy.deepcopy(whole.b), copy.deepcopy(whole.c)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.c(F.relu(self.b(F.relu(x)))))


class Modes(nn.Module):
    """Another structure in eval mode, so that there are two graphs, with other numbers of sites and other names."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(6, 6) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x))
        if self.training:
            x = torch.relu(x * 2)
        return self.c(torch.relu(self.b(x)))  # type: ignore[no-any-return]


class LastModes(nn.Module):
    def __init__(self, whole: Modes) -> None:
        super().__init__()
        self.b, self.c = copy.deepcopy(whole.b), copy.deepcopy(whole.c)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.relu(self.b(x)))  # type: ignore[no-any-return]


class FirstModes(nn.Module):
    def __init__(self, whole: Modes) -> None:
        super().__init__()
        self.a = copy.deepcopy(whole.a)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x))
        return torch.relu(x * 2) if self.training else x


class Shared(nn.Module):
    """A layer that is called three times."""

    def __init__(self) -> None:
        super().__init__()
        self.first: nn.Module | None = nn.Linear(6, 6)
        self.layer = nn.Linear(6, 6)
        self.last: nn.Module | None = nn.Linear(6, 6)
        self.calls = 3

    def forward(self, x: Tensor) -> Tensor:
        if self.first is not None:
            x = self.first(x)
        for _ in range(self.calls):
            x = torch.tanh(self.layer(x))
        return self.last(x) if self.last is not None else x


class Steps(nn.Module):
    """A cell in a loop, whose calls are the steps of one sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.out = nn.GRUCell(4, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(x.shape[0], 6)
        for t in range(3):
            h = self.cell(x[:, t], h)
        return self.out(torch.relu(h))  # type: ignore[no-any-return]


class Recurrent(nn.Module):
    """A layer that returns a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.out = nn.LSTM(4, 6, batch_first=True), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        y, (h, _) = self.lstm(x)
        return self.out(torch.relu(y) + h[0].unsqueeze(1))  # type: ignore[no-any-return]
