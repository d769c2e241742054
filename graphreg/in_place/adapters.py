"""Adapters of PEFT that are disabled for a while, as by ``peft_model.disable_adapter()``: a layer then calls only what it wraps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn


def disabled_adapters(model: nn.Module) -> list[Any]:
    """Return the layers in the model whose adapters are disabled."""
    return [inner for inner in model.modules() if getattr(inner, "disable_adapters", None) is True and hasattr(inner, "enable_adapters")]


@contextmanager
def adapters_enabled(layers: Sequence[Any]) -> Iterator[None]:
    """Within the context, enable the adapters of the layers. Afterwards, the layers are as they were before."""
    flags = {parameter: parameter.requires_grad for layer in layers for parameter in layer.parameters()}
    states = [dict(vars(layer)) for layer in layers]
    try:
        for layer in layers:
            layer.enable_adapters(True)
        yield
    finally:
        for layer, state in zip(layers, states, strict=True):
            vars(layer).update(state)
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
