"""What a provider of models is, and how the smallest inputs that a model takes are found."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Inputs = tuple[Tensor, ...]
Attempt = tuple[Mapping[str, Any], Inputs]  # options of the builder, and the inputs that belong to them


@dataclass(frozen=True)
class Provider:
    """``names()``: the models, each with the family it stands for; ``build(name)``: one of them and its inputs."""

    names: Callable[[], Mapping[str, str]]
    build: Callable[[str], tuple[nn.Module, Inputs]]


def smallest(build: Callable[..., nn.Module], attempts: Iterator[Attempt]) -> tuple[nn.Module, Inputs]:
    """The model with the first inputs that it takes in both modes; its own error where it takes none."""
    error: Exception = RuntimeError("it has no inputs to be tried with")
    model, built = None, None
    for options, inputs in attempts:
        try:
            if model is None or options != built:
                model = None  # two of the largest do not fit
                torch.manual_seed(0)
                model, built = build(**options), options
            _try(model, inputs)
            return model.train(), inputs
        except Exception as raised:  # whatever a model has against a size
            error = raised.with_traceback(None)
    raise error


def _try(model: nn.Module, inputs: Inputs) -> None:
    with torch.no_grad():
        for mode in (True, False):
            if not all(t.isfinite().all() for t in tensors(model.train(mode)(*inputs))):
                raise FloatingPointError("its output is not finite")


def tensors(output: Any) -> list[Tensor]:
    """Every tensor of an output, in order."""
    if isinstance(output, Tensor):
        return [output]
    if output is None or isinstance(output, (bool, int, float, str)):
        return []
    items = output.values() if isinstance(output, Mapping) else output if isinstance(output, (tuple, list)) else vars(output).values()
    return [tensor for item in items for tensor in tensors(item)]


def images(size: int, channels: int = 3) -> Inputs:
    return (torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(0)),)


def clips(frames: int, size: int, batch: int = 2) -> Inputs:
    return (torch.randn(batch, 3, frames, size, size, generator=torch.Generator().manual_seed(0)),)
