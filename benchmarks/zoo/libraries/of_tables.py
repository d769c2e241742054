"""rtdl and rtdl_revisiting_models: networks for tables, with numbers, categories and both."""

from __future__ import annotations

from typing import Any

import rtdl
import rtdl_num_embeddings as embeddings
import rtdl_revisiting_models as revisited
import torch
from torch import Tensor, nn

from zoo.libraries.made import Entry, provider
from zoo.providers import Inputs, numbers

COLUMNS, CATEGORIES, WIDTH = 5, (3, 4), 16


def rows() -> Inputs:
    return (numbers(4, COLUMNS),)


def both() -> Inputs:
    return numbers(4, COLUMNS), torch.tensor([[0, 3], [1, 2], [2, 1], [0, 0]])


class Embedded(nn.Module):
    """Each number embedded by itself, and a perceptron on all."""

    def __init__(self, embedding: Any, width: int) -> None:
        super().__init__()
        self.embedding = embedding
        self.body = revisited.MLP(d_in=COLUMNS * width, d_out=2, n_blocks=2, d_block=WIDTH, dropout=0.1)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.body(self.embedding(x).flatten(1))
        return found


def bins() -> list[Tensor]:
    return embeddings.compute_bins(numbers(64, COLUMNS, seed=2), n_bins=4)  # type: ignore[no-any-return]


def entries() -> dict[str, Entry]:
    sizes: dict[str, Any] = {
        "d_token": WIDTH,
        "n_blocks": 2,
        "attention_dropout": 0.1,
        "ffn_d_hidden": 16,
        "ffn_dropout": 0.1,
        "residual_dropout": 0.1,
    }
    again: dict[str, Any] = {
        "d_block": WIDTH,
        "n_blocks": 2,
        "attention_n_heads": 2,
        "attention_dropout": 0.1,
        "ffn_d_hidden": None,
        "ffn_d_hidden_multiplier": 2,
        "ffn_dropout": 0.1,
        "residual_dropout": 0.0,
    }
    residual: dict[str, Any] = {"n_blocks": 2, "dropout1": 0.1, "dropout2": 0.1, "d_out": 2}
    return {
        "rtdl.MLP": Entry(lambda: rtdl.MLP.make_baseline(d_in=COLUMNS, d_layers=[16, 16], dropout=0.1, d_out=2), rows, "perceptron"),
        "rtdl.ResNet": Entry(
            lambda: rtdl.ResNet.make_baseline(
                d_in=COLUMNS, n_blocks=2, d_main=WIDTH, d_hidden=16, dropout_first=0.1, dropout_second=0.1, d_out=2
            ),
            rows,
            "residual",
        ),
        "rtdl.FTTransformer": Entry(
            lambda: rtdl.FTTransformer.make_baseline(n_num_features=COLUMNS, cat_cardinalities=list(CATEGORIES), d_out=2, **sizes),
            both,
            "transformer",
        ),
        "MLP": Entry(lambda: revisited.MLP(d_in=COLUMNS, d_out=2, n_blocks=2, d_block=WIDTH, dropout=0.1), rows, "perceptron"),
        "ResNet": Entry(
            lambda: revisited.ResNet(d_in=COLUMNS, d_block=WIDTH, d_hidden=None, d_hidden_multiplier=2.0, **residual), rows, "residual"
        ),
        "FTTransformer": Entry(
            lambda: revisited.FTTransformer(n_cont_features=COLUMNS, cat_cardinalities=list(CATEGORIES), d_out=2, **again),
            both,
            "transformer",
        ),
        "FTTransformer of numbers": Entry(
            lambda: revisited.FTTransformer(
                n_cont_features=COLUMNS,
                cat_cardinalities=[],
                d_out=2,
                linformer_kv_compression_ratio=0.5,
                linformer_kv_compression_sharing="headwise",
                **again,
            ),
            lambda: (*rows(), None),
            "transformer",
        ),
        "LinearEmbeddings": Entry(lambda: Embedded(embeddings.LinearReLUEmbeddings(COLUMNS, 6), 6), rows, "embedded"),
        "PeriodicEmbeddings": Entry(lambda: Embedded(embeddings.PeriodicEmbeddings(COLUMNS, 6, lite=False), 6), rows, "embedded"),
        "PiecewiseLinearEmbeddings": Entry(
            lambda: Embedded(embeddings.PiecewiseLinearEmbeddings(bins(), 6, activation=True, version="B"), 6), rows, "embedded"
        ),
    }


PROVIDER = provider(entries)
