"""Models whose forward decides: by the shapes of its inputs, or by what is in them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.providers import numbers
from zoo.recurrent import CLASSES, STEPS, WIDTH, Entry, provider


class Layers(nn.Module):
    """What most models here are made of."""

    def __init__(self) -> None:
        super().__init__()
        self.hid, self.mid, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES)
        self.drop = nn.Dropout(0.1)


class Steps(Layers):
    """A loop as long as the sequence."""

    def forward(self, x: Tensor) -> Tensor:
        state = torch.zeros_like(x[:, 0])
        for t in range(x.shape[1]):
            state = torch.relu(self.hid(x[:, t]) + self.mid(state))
        return self.out(self.drop(state))


class LongOrShort(Layers):
    """One layer for short sequences, another for long ones."""

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.hid(x) if x.size(1) > 4 else self.mid(x))
        return self.out(self.drop(h if x.size(1) > 100 else torch.relu(self.mid(h))).mean(dim=1))


class PaddedBlocks(Layers):
    """The sequence padded to whole blocks, each attended to by itself."""

    def forward(self, x: Tensor) -> Tensor:
        batch, steps, width = x.shape
        short = -steps % 4
        if short:
            x = F.pad(x, (0, 0, 0, short))
        blocks = self.hid(x).reshape(batch, -1, 4, width)
        mixed = F.scaled_dot_product_attention(blocks, blocks, blocks).flatten(1, 2)[:, :steps]
        return self.out(self.drop(torch.relu(self.mid(mixed))))


class Halves(Layers):
    """A recursion that folds the sequence in half until one step is left."""

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.drop(self.fold(x)))

    def fold(self, x: Tensor) -> Tensor:
        if x.shape[1] == 1:
            return x[:, 0]
        half = x.shape[1] // 2
        return torch.relu(self.hid(self.fold(x[:, :half])) + self.mid(self.fold(x[:, half:])))


class Windows(Layers):
    """Overlapping windows, collected in a list."""

    def forward(self, x: Tensor) -> Tensor:
        size, found = 3, []
        start = 0
        while start + size <= x.shape[1]:
            found.append(torch.relu(self.hid(x[:, start : start + size].mean(dim=1))))
            start += 2
        return self.out(self.drop(self.mid(torch.stack(found).amax(dim=0))))


class Pyramid(nn.Module):
    """Convolutions until the picture is small, however large it came."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, stride=2, padding=1), nn.Linear(8, CLASSES)
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        while min(x.shape[-2:]) > 4:
            x = torch.relu(self.norm(self.conv(x)))
        return self.head(x.mean(dim=(-2, -1)))


class Example(Layers):
    """A loop over the batch, example by example."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.out(self.drop(torch.relu(self.hid(example)))).mean(dim=0) for example in x])


class Sign(Layers):
    """A branch on the sum of the input."""

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.hid(x))
        h = torch.tanh(self.mid(h)) if x.sum() > 0 else h * 0.5
        return self.out(self.drop(h))


class EarlyExit(Layers):
    """Leaves as soon as it is sure."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.drop(torch.relu(self.hid(x)))
        early = self.out(h)
        if early.softmax(dim=-1).amax() > 0.99:
            return early
        return self.out(torch.relu(self.mid(h)))


class Settles(Layers):
    """A fixed point: as many steps as it takes, ten at most."""

    def forward(self, x: Tensor) -> Tensor:
        h, steps, moved = torch.tanh(self.hid(x)), 0, torch.ones(())
        while moved > 1e-3 and steps < 10:
            new = 0.5 * h + 0.5 * torch.tanh(0.1 * self.mid(h))
            moved, h, steps = (new - h).abs().amax(), new, steps + 1
        return self.out(self.drop(h))


class Chosen(Layers):
    """Works on the positions that the data selects, as many as there are."""

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.hid(x))
        where = torch.nonzero(x.mean(dim=-1) > 0)
        chosen = self.drop(self.mid(h[where[:, 0], where[:, 1]]))
        return self.out(h.index_put((where[:, 0], where[:, 1]), chosen))


class Experts(nn.Module):
    """A mixture of experts in a loop: each sees the tokens that its router sends it."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.head = nn.Linear(WIDTH, 4), nn.Linear(WIDTH, CLASSES)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, 32), nn.ReLU(), nn.Linear(32, WIDTH)) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        weights, chosen = self.router(tokens).softmax(dim=-1).max(dim=-1)
        out = torch.zeros_like(tokens)
        for index, expert in enumerate(self.experts):
            sent = (chosen == index).nonzero().squeeze(-1)
            if sent.numel():
                out = out.index_add(0, sent, weights[sent, None] * expert(tokens[sent]))
        return self.head(x + out.view_as(x))


class Depth(Layers):
    """How often a layer runs is a number in the input."""

    def forward(self, x: Tensor, times: Tensor) -> Tensor:
        h = torch.relu(self.hid(x))
        for _ in range(int(times.item())):
            h = h + torch.relu(self.mid(h))
        return self.out(self.drop(h))


X = numbers(2, STEPS, WIDTH)
SHAPE, DATA = "by shapes", "by data"

CONTROL: Mapping[str, Entry] = {
    "loop_over_steps": (Steps, (X,), SHAPE),
    "long_or_short": (LongOrShort, (X,), SHAPE),
    "padded_blocks": (PaddedBlocks, (X,), SHAPE),
    "folds_in_half": (Halves, (X,), SHAPE),
    "windows": (Windows, (X,), SHAPE),
    "pyramid": (Pyramid, (numbers(2, 3, 32, 32),), SHAPE),
    "loop_over_batch": (Example, (X,), SHAPE),
    "sign_of_sum": (Sign, (X,), DATA),
    "early_exit": (EarlyExit, (X,), DATA),
    "until_it_settles": (Settles, (X,), DATA),
    "chosen_positions": (Chosen, (X,), DATA),
    "experts": (Experts, (X,), DATA),
    "depth_in_the_input": (Depth, (X, torch.tensor(3)), DATA),
}

PROVIDER = provider(CONTROL)
