"""The price of the proof: CPU time of a trace with and without it, in forwards of the model. It runs two forwards for each mode."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torchvision
from page import arguments, chosen, row
from torch import nn
from transformers import BertConfig, BertModel

import graphreg

GOAL = 4.0  # forwards: of the model and of its graph, in train mode and in eval mode


def bert() -> nn.Module:
    return BertModel(BertConfig(hidden_size=256, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=4, vocab_size=1000))


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]] = {
    "MLP 3×256, batch 64": (
        lambda: nn.Sequential(*(each for _ in range(3) for each in (nn.Linear(256, 256), nn.ReLU()))), lambda: torch.randn(64, 256)
    ),
    "resnet18, 8×3×224×224": (torchvision.models.resnet18, lambda: torch.randn(8, 3, 224, 224)),
    "resnet50, 8×3×224×224": (torchvision.models.resnet50, lambda: torch.randn(8, 3, 224, 224)),
    "vit_b_16, 4×3×224×224": (torchvision.models.vit_b_16, lambda: torch.randn(4, 3, 224, 224)),
    "BERT, 6 layers of 256, 8×128, by torch.export": (bert, lambda: {"input_ids": torch.randint(0, 1000, (8, 128))}),
}  # fmt: skip


def seconds(run: Callable[[], Any]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def forwards(model: nn.Module, inputs: Any) -> None:
    """Run the model twice in train mode and twice in eval mode, without gradients."""
    with torch.no_grad():
        for mode in (True, False):
            for _ in range(2):
                model.train(mode)(**inputs) if isinstance(inputs, dict) else model(inputs)
    model.train()


def measure(name: str, rounds: int) -> str:
    make, example = CASES[name]
    torch.manual_seed(0)
    model, inputs = make(), example()
    ways = {
        "four forwards": lambda: forwards(model, inputs),
        "unproved": lambda: graphreg.trace(model, inputs, prove=False),
        "proved": lambda: graphreg.trace(model, inputs),
    }
    times: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(rounds + 1):
        for way, run in ways.items():
            taken = seconds(run)
            if turn:
                times[way].append(taken)
    four, without, proved = (statistics.median(each) for each in times.values())
    ratio = statistics.median(4 * (p - u) / f for f, u, p in zip(*times.values(), strict=True))
    return row(name, f"{four:.3f}", f"{without:.3f}", f"{proved:.3f}", f"{ratio:.2f}", f"{GOAL:.0f}")


def main() -> None:
    options = arguments(__doc__, ("--rounds", 5), ("--threads", 1), names=CASES)
    torch.set_num_threads(options.threads)
    print(f"{options.threads} thread, {options.rounds} interleaved rounds; CPU seconds.\n")
    print(row("model", "four forwards, s", "trace unproved, s", "trace proved, s", "the proof, in forwards", "goal"))
    print(row(*["---"] * 6))
    for name in chosen(CASES, options.only):
        print(measure(name, options.rounds), flush=True)


if __name__ == "__main__":
    main()
