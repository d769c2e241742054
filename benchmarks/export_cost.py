"""The cost of ``regularize()`` with the export front end, checks included, in units of the two torch.export calls that it needs."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torchvision
from page import arguments, chosen, progress, row
from torch import Tensor, nn
from torch.export import Dim
from transformers import BertConfig, BertForMaskedLM

import graphreg


def image_model() -> tuple[nn.Module, dict[str, Tensor]]:
    return torchvision.models.resnet18(num_classes=10), {"x": torch.randn(2, 3, 64, 64)}


def language_model() -> tuple[nn.Module, dict[str, Tensor]]:
    config = BertConfig(num_hidden_layers=4, num_attention_heads=2, hidden_size=32, intermediate_size=64, vocab_size=100)
    return BertForMaskedLM(config), {"input_ids": torch.randint(0, 100, (2, 9))}


def branching_model() -> tuple[nn.Module, dict[str, Tensor]]:
    return torchvision.models.googlenet(num_classes=10, init_weights=False), {"x": torch.randn(2, 3, 64, 64)}


MODELS: dict[str, Callable[[], tuple[nn.Module, dict[str, Tensor]]]] = {
    "resnet18": image_model,
    "bert, 4 layers": language_model,
    "googlenet": branching_model,
}


def two_exports(model: nn.Module, inputs: dict[str, Tensor]) -> None:
    """What whoever needs both modes pays to torch.export alone."""
    sizes = {name: dict.fromkeys(range(value.dim()), Dim.AUTO) for name, value in inputs.items()}
    for mode in (True, False):
        torch.export.export(model.train(mode), (), inputs, dynamic_shapes=sizes, strict=False)
    model.train()


def regularized(model: nn.Module, inputs: dict[str, Any]) -> None:
    graphreg.regularize(model, example_inputs=inputs, front_end="export", rng=0, hidden_dropout=0.1, hidden_l1=1e-3, weight_l2=1e-4)


def seconds(run: Callable[..., None], *given: Any) -> float:
    """Of the processor, so that what else the machine does is not counted."""
    gc.collect()
    start = time.process_time()
    run(*given)
    return time.process_time() - start


def main() -> None:
    options = arguments(__doc__, ("--rounds", 3), names=MODELS)
    torch.set_num_threads(1)
    print(f"1 thread, {options.rounds} interleaved rounds. The ratio is that of `regularize()` to two calls of `torch.export.export`.\n")
    print(row("model", "two exports, s", "`regularize()`, s", "ratio"))
    print(row(*["---"] * 4))
    for name, make in chosen(MODELS, options.only).items():
        progress(f"cost of regularize() by export: {name}")
        model, inputs = make()
        regularized(model, inputs)  # imports, caches
        two_exports(model, inputs)
        times = [(seconds(two_exports, model, inputs), seconds(regularized, model, inputs)) for _ in range(options.rounds)]
        low, middle, high = statistics.quantiles(ours / theirs for theirs, ours in times)
        exports, ours = (statistics.median(column) for column in zip(*times, strict=True))
        print(row(name, f"{exports:.2f}", f"{ours:.2f}", f"{middle:.2f} ± {(high - low) / 2:.2f}"), flush=True)


if __name__ == "__main__":
    main()
