"""Step time, forward and backward, of native dropout moved to graphreg's streams, against the same model as it is."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from page import arguments, chosen, progress, row
from torch import Tensor, nn

import graphreg
from workloads import RATE


class Alone(nn.Module):
    """Nothing but the dropout."""

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, RATE, self.training)


class Around(nn.Module):
    """A forward that is not torch's own, which Dynamo would not begin with."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


def mlp(width: int) -> nn.Module:
    return Around(
        nn.Sequential(*[m for _ in range(4) for m in (nn.Linear(width, width), nn.ReLU(), nn.Dropout(RATE))], nn.Linear(width, 10))
    )


class Encoder(nn.Module):
    """A transformer's layer with torch's attention: dropout in it, behind it, in the MLP and behind that."""

    def __init__(self, width: int = 256) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 4, RATE, batch_first=True)
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.ReLU(), nn.Dropout(RATE), nn.Linear(4 * width, width), nn.Dropout(RATE))
        self.dropout = nn.Dropout(RATE)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm_1(x + self.dropout(self.attention(x, x, x, need_weights=False)[0]))
        return self.norm_2(x + self.mlp(x))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "F.dropout alone, 64x64": (Alone, (64, 64)),
    "F.dropout alone, 256x512": (Alone, (256, 512)),
    "F.dropout alone, 16x128x1024": (Alone, (16, 128, 1024)),
    "MLP 4x512, batch 256": (lambda: mlp(512), (256, 512)),
    "MLP 4x64, batch 64": (lambda: mlp(64), (64, 64)),
    "transformer layer 256, 16x128": (Encoder, (16, 128, 256)),
}


def step(module: Callable[[Tensor], Tensor | tuple[Tensor, object]], x: Tensor) -> None:
    x.grad = None
    out = module(x)
    (out if isinstance(out, Tensor) else out[0]).square().mean().backward()


def measure(name: str, compiled: bool, rounds: int) -> tuple[float, float, float]:
    """Milliseconds of the model as it is, the median of the ratio round by round, and its spread (quartiles' half distance)."""
    torch._dynamo.reset()
    make, shape = MODELS[name]
    torch.manual_seed(0)
    x, own = torch.randn(shape, requires_grad=True), make()
    seeded = graphreg.regularize(own, example_inputs=x.detach(), own_dropout="seeded", rng=0)
    forms: tuple[nn.Module, ...] = (own, seeded)
    for form in forms:
        if compiled:
            form.compile(fullgraph=True)
        for _ in range(4):
            step(form, x)
    times: list[list[float]] = [[], []]
    for _ in range(rounds):  # interleaved
        for form, taken in zip(forms, times, strict=True):
            start = time.perf_counter()
            step(form, x)
            taken.append(time.perf_counter() - start)
    low, middle, high = statistics.quantiles([b / a for a, b in zip(*times, strict=True)])
    return statistics.median(times[0]) * 1e3, middle, (high - low) / 2


def main() -> None:
    options = arguments(__doc__, ("--rounds", 30), ("--threads", 1), names=MODELS)
    torch.set_num_threads(options.threads)
    print(f"{options.threads} thread{'s' * (options.threads > 1)}, {options.rounds} interleaved rounds. "
          "The last column is the ratio to the unchanged model.\n")
    print(row("model", "mode", "unchanged, ms", 'own_dropout="seeded"'))
    print(row(*["---"] * 4))
    for name in chosen(MODELS, options.only):
        for compiled in (False, True):
            progress(f"native dropout: {name}, {'compiled' if compiled else 'eager'}")
            plain, ratio, spread = measure(name, compiled, options.rounds)
            print(row(name, "compiled" if compiled else "eager", f"{plain:.2f}", f"{ratio:.2f} ± {spread:.2f}"), flush=True)


if __name__ == "__main__":
    main()
