"""Compares a traced model with the model itself, in both modes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import graphreg


def assert_both_modes_are_the_models(model: nn.Module, x: Any, example_inputs: Any = None) -> None:
    """Trace a model, and compare outputs bit for bit in train mode and in eval mode, from the same state of the generator."""
    module = graphreg.strip(graphreg.regularize(model, example_inputs=example_inputs, prove=False, weight_l2=1.0))
    for mode in (True, False):
        outputs = []
        for each in (model.train(mode), module.train(mode)):
            torch.manual_seed(1)
            outputs.append(each(x))
        torch.testing.assert_close(*outputs, rtol=0, atol=0)
