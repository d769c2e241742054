"""Step time with each built-in regularizer alone, at its default sites where it has some, beside the same model without it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from alternate import Series, alternated
from figures import ratio
from page import arguments, chosen, progress, row, stored
from torch import Tensor, nn

import graphreg
from known_models import AsItIs, CausalBlock, Summed
from workloads import MLP, ConvNet


class Sigmoids(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*[m for _ in range(3) for m in (nn.Linear(256, 256), nn.Sigmoid())], nn.Linear(256, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)  # type: ignore[no-any-return]


class Decoder(nn.Module):
    """Two blocks of a language model, with its table of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.blocks = nn.Embedding(1000, 128), nn.Sequential(CausalBlock(128), CausalBlock(128))
        self.head = nn.Linear(128, 1000)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.blocks(self.words(tokens)))  # type: ignore[no-any-return]


class Cells(nn.Module):
    """A cell that is called for each of ten steps."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.GRUCell(64, 128), nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = self.cell(x[:, 0])
        for i in range(1, 10):
            h = self.cell(x[:, i], h)
        return self.head(h)  # type: ignore[no-any-return]


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.GRU(64, 128, batch_first=True), nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        out, _ = self.rnn(x)
        return self.head(out[:, -1])  # type: ignore[no-any-return]


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "MLP": (MLP, lambda: torch.randn(128, 512)), "sigmoids": (Sigmoids, lambda: torch.randn(128, 256)),
    "conv net": (lambda: ConvNet(32), lambda: torch.randn(8, 3, 32, 32)),
    "decoder": (Decoder, lambda: torch.randint(1000, (4, 64))), "cells": (Cells, lambda: torch.randn(32, 10, 64)),
    "GRU": (Recurrent, lambda: torch.randn(32, 40, 64)),
}  # fmt: skip
# By keyword: the model, the value of the keyword, and whether the shapes of its values must be known.
REGULARIZERS: dict[str, tuple[str, Any, bool]] = {
    "dropout": ("MLP", 0.1, False), "noise": ("MLP", 0.1, False), "gaussian_dropout": ("MLP", 0.1, False),
    "alpha_dropout": ("MLP", 0.1, False), "channel_dropout": ("conv net", 0.1, False), "drop_block": ("conv net", 0.1, False),
    "locked_dropout": ("decoder", {"weight": 0.1, "pattern": "blocks.*.act"}, False), "head_dropout": ("decoder", 0.1, False),
    "drop_path": ("decoder", 0.1, False), "layer_drop": ("decoder", {"weight": 0.1, "pattern": ["blocks.0", "blocks.1"]}, False),
    "zoneout": ("cells", 0.1, False), "concrete_dropout": ("MLP", 1e-3, True), "l0_gates": ("MLP", 1e-3, True),
    "neftune": ("decoder", 5.0, False), "weight_noise": ("MLP", 0.01, False), "drop_connect": ("MLP", 0.1, False),
    "embedding_dropout": ("decoder", 0.1, False), "hidden_l1": ("MLP", 1e-3, False), "hidden_l2": ("MLP", 1e-3, False),
    "kl_sparsity": ("sigmoids", 1e-3, False), "hoyer_square": ("MLP", 1e-3, False), "decov": ("MLP", 1e-3, False),
    "covariance": ("MLP", 1e-3, False), "variance_floor": ("MLP", 1e-3, False), "contractive": ("MLP", 1e-3, False),
    "recurrent_norm": ("GRU", {"weight": 1e-3, "pattern": "rnn:out"}, False),
    "recurrent_state": ("GRU", {"weight": 1e-3, "pattern": "rnn:out"}, False),
    "confidence": ("MLP", 1e-3, False), "z_loss": ("MLP", 1e-3, False), "weight_l1": ("MLP", 1e-3, False),
    "weight_l2": ("MLP", 1e-3, False), "elastic_net": ("MLP", 1e-3, False), "group_lasso": ("MLP", 1e-3, False),
    "orthogonality": ("MLP", 1e-3, False), "max_norm": ("MLP", {"weight": 1e-3, "limit": 1.0}, False), "l2_sp": ("MLP", 1e-3, False),
    "spectral": ("MLP", 1e-3, False),
}  # fmt: skip


def regularized(keyword: str, model: nn.Module, x: Tensor) -> nn.Module:
    _, value, needs_inputs = REGULARIZERS[keyword]
    return Summed(graphreg.regularize(model, rng=0, example_inputs=x if needs_inputs else None, **{keyword: value}))


def built(keyword: str, with_it: bool, compiled: bool) -> tuple[Callable[[], None], dict[str, object]]:
    """For ``alternate.py``: a step of the regularizer's model, with or without it."""
    make, inputs = MODELS[REGULARIZERS[keyword][0]]
    torch.manual_seed(0)
    x, model = inputs(), make()
    module = regularized(keyword, model, x) if with_it else AsItIs(model)
    if compiled:
        module.compile(fullgraph=with_it or not isinstance(model, Recurrent))  # Dynamo takes no nn.GRU, and leaves it to eager

    def step() -> None:
        module.zero_grad()
        output, penalty = module(x)
        (output.square().mean() + penalty).backward()

    for _ in range(3):
        step()
    return step, {}


def cell(found: dict[str, Series]) -> tuple[str, dict[str, Any]]:
    if found["with"].error or found["without"].error:
        error = found["with"].error or found["without"].error
        return "fails", {"error": error}
    measured = ratio(found["with"].seconds, found["without"].seconds)
    return str(measured), asdict(measured)


def main() -> None:
    options = arguments(__doc__, ("--rounds", 9), names=REGULARIZERS)
    print(
        f"1 thread, {options.rounds} rounds. Ratios to the unregularized step of the same model in the same mode, each in a process of its "
        "own. In brackets: the interval of 95 % of the median.\n"
    )
    print(row("regularizer", "model", "eager", "compiled"))
    print(row(*["---"] * 4))
    for keyword, (model, _, _) in chosen(REGULARIZERS, options.only).items():
        shown, data = [], {"model": model}
        for compiled in (False, True):
            mode = "compiled" if compiled else "eager"
            progress(f"{keyword}, {mode}")
            variants = {"without": [keyword, False, compiled], "with": [keyword, True, compiled]}
            text, data[mode] = cell(alternated("catalogue:built", variants, options.rounds))
            shown.append(text)
        stored("catalogue", keyword, data)
        print(row(f"`{keyword}`", model, *shown), flush=True)


if __name__ == "__main__":
    main()
