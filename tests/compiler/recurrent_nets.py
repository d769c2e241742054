"""Models with recurrent layers, and what the tests compare of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Setting:
    """One way to make and to call a recurrent layer."""

    kind: str = "LSTM"
    layers: int = 1
    bidirectional: bool = False
    batch_first: bool = False
    dropout: float = 0.0
    bias: bool = True
    states: bool = False
    proj: bool = False
    unbatched: bool = False
    training: bool = True
    raw: bool = True  # the input needs no gradient
    trained: str = "all"
    dtype: torch.dtype = torch.float32
    autocast: bool = False

    def layer(self) -> nn.RNNBase:
        more: dict[str, Any] = {"nonlinearity": self.kind} if self.kind in ("tanh", "relu") else {"proj_size": 2} if self.proj else {}
        kind: Callable[..., nn.RNNBase] = {"LSTM": nn.LSTM, "GRU": nn.GRU}.get(self.kind, nn.RNN)
        made = kind(
            3, 5, self.layers, bias=self.bias, batch_first=self.batch_first, dropout=self.dropout, bidirectional=self.bidirectional,
            dtype=self.dtype, **more,
        )  # fmt: skip
        for name, parameter in made.named_parameters():
            parameter.requires_grad = self.trained == "all" or (self.trained == "hidden" and "weight_hh" in name)
        return made.train(self.training)

    def inputs(self, time: int = 6, batch: int = 2) -> list[Tensor]:
        sides = self.layers * (1 + self.bidirectional)
        shape = (batch, time, 3) if self.batch_first else (time, batch, 3)
        units = [2 if self.proj else 5, 5][: 1 + (self.kind == "LSTM")] if self.states else []
        shapes = [shape, *((sides, batch, n) for n in units)]
        if self.unbatched:
            shapes = [(time, 3), *((sides, n) for n in units)]
        x, *states = (torch.randn(s, dtype=self.dtype) for s in shapes)
        return [x.requires_grad_(not self.raw), *(s.requires_grad_() for s in states)]


# Each value of each field with each value of each other, in as few settings as a greedy search finds.
VALUES: dict[str, tuple[Any, ...]] = {
    "kind": ("LSTM", "GRU", "tanh", "relu"), "layers": (1, 2), "bidirectional": (False, True), "batch_first": (False, True),
    "dropout": (0.0, 0.4), "bias": (True, False), "states": (False, True), "proj": (False, True), "unbatched": (False, True),
    "training": (True, False), "raw": (True, False), "trained": ("all", "hidden", "none"), "dtype": (torch.float32, torch.float64),
    "autocast": (False, True),
}  # fmt: skip


def possible(s: Setting) -> bool:
    return not (
        (s.proj and s.kind != "LSTM")
        or (s.dropout and s.layers == 1)
        or (s.autocast and s.dtype == torch.float64)
        or (s.trained == "none" and s.raw and not s.states)
    )


def pairs(s: Setting) -> set[tuple[Any, ...]]:
    return {(a, getattr(s, a), b, getattr(s, b)) for a, b in combinations(VALUES, 2)}


def pairwise() -> list[Setting]:
    generator = torch.Generator().manual_seed(0)

    def drawn() -> Setting:
        return Setting(**{name: of[int(torch.randint(len(of), (), generator=generator))] for name, of in VALUES.items()})

    pool = {s: pairs(s) for s in (drawn() for _ in range(1200)) if possible(s)}
    wanted, chosen = set().union(*pool.values()), list[Setting]()
    while wanted:
        best = max(pool, key=lambda s: len(pool[s] & wanted))
        chosen.append(best)
        wanted -= pool[best]
    return chosen


def told(s: Setting) -> str:
    """The setting as the name of a test: what differs from the usual."""
    usual = Setting()
    differs = [f"{name}={str(getattr(s, name)).removeprefix('torch.')}" for name in VALUES if getattr(s, name) != getattr(usual, name)]
    return " ".join(differs) or "usual"


class Bare(nn.Module):
    """The layer alone: all that it returns is returned. It reads no leaf, which autocast would convert once for all uses."""

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.rnn = layer

    def forward(self, x: Tensor) -> Any:
        return self.rnn(x.clone())


class Started(Bare):
    def forward(self, x: Tensor, h: Tensor) -> Any:  # type: ignore[override]
        return self.rnn(x.clone(), h.clone())


class StartedLSTM(Bare):
    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> Any:  # type: ignore[override]
        return self.rnn(x.clone(), (h.clone(), c.clone()))


def net(s: Setting) -> nn.Module:
    kind = Bare if not s.states else StartedLSTM if s.kind == "LSTM" else Started
    return kind(s.layer())


class Classifier(nn.Module):
    """What users have: a recurrent layer on raw features, its last step to classes."""

    def __init__(self, kind: type[nn.RNNBase] = nn.LSTM, **more: Any) -> None:
        super().__init__()
        self.rnn, self.head = kind(3, 8, batch_first=True, **more), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        out, _ = self.rnn(x)
        return self.head(out[:, -1])


def tensors(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [t for item in value for t in tensors(item)]


def answer(
    run: Callable[..., Any], module: nn.Module, inputs: Sequence[Tensor], autocast: bool = False
) -> tuple[list[Tensor], list[Tensor | None]]:
    """The outputs, and the gradients of inputs and parameters of a sum that tells every element from every other."""
    given = [t.detach().clone().requires_grad_(t.requires_grad) for t in inputs]
    module.zero_grad()
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = tensors(run(*given))
    weights = [torch.linspace(0.5, 1.5, t.numel(), dtype=torch.float64).reshape(t.shape).to(t.dtype) for t in found]
    if any(t.requires_grad for t in found):
        sum((w * t).float().sum() for w, t in zip(weights, found, strict=True)).backward()  # type: ignore[union-attr]
    return [t.detach() for t in found], [t.grad for t in (*given, *module.parameters())]


def same(ours: Any, theirs: Any) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
