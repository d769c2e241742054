"""Whether a compiled backward should recompute a splice: step time and kept bytes with and without, by activation and dtype."""

from __future__ import annotations

import time

import torch
from figures import Figure, ratio
from memory import kept_bytes
from page import arguments, chosen, progress, row, stored
from torch import Tensor, nn

import graphreg

WIDTH, BATCH = 512, 256
ACTIVATIONS = {"relu": nn.ReLU, "sigmoid": nn.Sigmoid, "softmax": lambda: nn.Softmax(-1), "gelu": nn.GELU}
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.bfloat16, torch.float64)}


class Net(nn.Module):
    """Linear layers, an activation behind each but the last, and dropout behind each activation."""

    def __init__(self, activation: str) -> None:
        super().__init__()
        layers = [layer for _ in range(4) for layer in (nn.Linear(WIDTH, WIDTH), ACTIVATIONS[activation]())]
        self.layers = nn.Sequential(*layers, nn.Linear(WIDTH, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)  # type: ignore[no-any-return]


def built(activation: str, dtype: torch.dtype, recomputed: bool, device: str) -> nn.Module:
    torch.manual_seed(0)
    module = graphreg.regularize(Net(activation), rng=0, hidden_dropout=0.1).to(device, dtype)
    for rule in module.modules():
        if hasattr(rule, "recomputed"):
            rule.recomputed = recomputed
    module.compile(fullgraph=True)
    return module


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def kept(module: nn.Module, x: Tensor) -> float:
    """Megabytes that the forward keeps for backward."""
    module(x)
    return kept_bytes(_Paired(module), x) / 1e6


class _Paired(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        output = self.module(x)
        output = output if isinstance(output, Tensor) else output[0]
        return output, output.new_zeros(())


def measure(activation: str, dtype: torch.dtype, rounds: int, device: str) -> tuple[Figure, dict[bool, float], float]:
    """Return the time with recomputation by the time without, megabytes kept for backward of both, and the ms without."""
    torch._dynamo.reset()
    forms = {flag: built(activation, dtype, flag, device) for flag in (False, True)}
    x, taken = torch.randn(BATCH, WIDTH, dtype=dtype, device=device), {flag: list[float]() for flag in forms}
    sizes = {flag: kept(form, x) for flag, form in forms.items()}
    for turn in range(rounds + 5):
        for flag, form in forms.items():
            synchronize(device)
            start = time.perf_counter()
            _Paired(form)(x)[0].square().mean().backward()
            synchronize(device)
            taken[flag] += [time.perf_counter() - start] if turn >= 5 else []
    return ratio(taken[True], taken[False]), sizes, sorted(taken[False])[rounds // 2] * 1e3


def main() -> None:
    options = arguments(__doc__, ("--rounds", 20), names=ACTIVATIONS)
    torch.set_num_threads(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(
        f"{device}, 1 thread, {options.rounds} interleaved rounds: {Net.__doc__} Width {WIDTH}, batch {BATCH}. graphreg recomputes behind "
        "relu, sigmoid and softmax, and not behind gelu, whose derivative is not computed from its output.\n"
    )
    print(row("activation", "dtype", "kept, ms", "recomputed / kept", "memory, MB, kept / recomputed"))
    print(row(*["---"] * 5))
    for activation in chosen(ACTIVATIONS, options.only):
        for name, dtype in DTYPES.items():
            progress(f"recompute: {activation}, {name}")
            found, sizes, milliseconds = measure(activation, dtype, options.rounds, device)
            data = {"ratio": found.median, "low": found.low, "high": found.high, "kept": sizes}
            stored("recompute", f"{device}, {activation}, {name}", data)
            print(row(activation, name, f"{milliseconds:.1f}", found, f"{sizes[False]:.1f} / {sizes[True]:.1f}"), flush=True)


if __name__ == "__main__":
    main()
