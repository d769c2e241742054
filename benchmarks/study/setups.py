"""The networks of the study by name. Each is a function of keywords for ``graphreg.regularize`` and a seed, and says in its docstring
what it trains."""

from __future__ import annotations

from collections.abc import Callable

from study.on_codes import autoencoder, transfer, views
from study.on_digits import deep, few, maps, plain_chain, resnet, selu, wide
from study.on_sequences import cells, lstm
from study.on_tables import columns, regression
from study.training import Outcome

Setup = Callable[..., Outcome]

SETUPS: dict[str, Setup] = {
    "few": few, "maps": maps, "deep": deep, "resnet": resnet, "wide": wide, "selu": selu, "chain": plain_chain, "cells": cells,
    "lstm": lstm, "autoencoder": autoencoder, "views": views, "transfer": transfer, "regression": regression, "columns": columns,
}  # fmt: skip
MEASURES = {
    "accuracy": "test accuracy, %",
    "gap": "training minus test accuracy, points",
    "entropy": "mean entropy of the predictions on test images, nats",
    "calibration": "expected calibration error on test images, %",
    "noisy": "test accuracy with normal noise of 0.3 on the pixels, %",
    "attacked": "test accuracy after a signed gradient step of 0.1 on the pixels, %",
    "zeros": "share of hidden activations that are exactly 0 on test images, %",
    "correlation": "mean absolute correlation between the units of a hidden layer on test images",
    "log_z": "mean absolute log of the softmax's sum on test images",
    "closed": "share of gates that are exactly 0 in eval mode, %",
    "pruned": "test accuracy without half of the units of each layer (few: those with the smallest norms) or every other block (deep), %",
    "early": "training loss without penalties, mean over steps 51 to 60",
    "jacobian": "root mean square, over test images, of the Frobenius norm of the code's Jacobian",
    "off_target": "mean over units of |mean activation on test images less 0.05|",
    "reconstruction": "cross-entropy of the reconstructed test images, nats an image",
    "spread": "mean standard deviation of an embedding's units over test images",
    "moved": "distance of the body's weights from their start (L2 norm)",
    "explained": "variance explained on test rows, R² in %",
    "apart": "standard deviation of the weights of a column and its copies, divided by their mean absolute value",
    "removed": "share of weights (regression) or of shuffled columns (columns) below 1 % of the largest, %",
    "kept": "share of real columns at or above 1 % of the largest, %",
}
