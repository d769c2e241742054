"""What a provider of models is, and how the smallest inputs that a model takes are found."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, zip_longest
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

Inputs = tuple[Any, ...] | dict[str, Any]  # positional, or by name
Attempt = tuple[Mapping[str, Any], Inputs]  # options of the builder, and the inputs that belong to them


@dataclass(frozen=True)
class Provider:
    """``names()``: the models, each with the family it stands for; ``build(name)``: one of them and its inputs; ``skipped()``: those
    that are passed over, with the reason."""

    names: Callable[[], Mapping[str, str]]
    build: Callable[[str], tuple[nn.Module, Inputs]]
    skipped: Callable[[], Mapping[str, str]] = dict


def provider(module: str, name: str) -> Provider:
    """One of a module's ``PROVIDERS``: a Provider, or where it stands."""
    found = importlib.import_module(module).PROVIDERS[name]
    return found if isinstance(found, Provider) else pkgutil.resolve_name(found)


def in_turn(families: Mapping[str, Sequence[str]], count: int) -> dict[str, str]:
    """The first of each family, then the second of each, and so on: ``count`` names, each with its family."""
    turns = zip_longest(*([(name, family) for name in names] for family, names in families.items()))
    return dict(islice((found for turn in turns for found in turn if found), count))


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
            try_out(model, inputs)
            return model.train(), inputs
        except Exception as raised:  # whatever a model has against a size
            error = raised.with_traceback(None)
    raise error


def try_out(model: nn.Module, inputs: Inputs) -> None:
    """Raises what a model has against its inputs, in either mode."""
    with torch.no_grad():
        for mode in (True, False):
            if not all(t.isfinite().all() for t in tensors(call(model.train(mode), inputs))):
                raise FloatingPointError("its output is not finite")


def call(module: Callable[..., Any], inputs: Inputs) -> Any:
    """A call on copies: a forward may write into what it is given."""
    mine = tree_map_only(Tensor, Tensor.clone, inputs)
    return module(**mine) if isinstance(mine, dict) else module(*mine)


def tensors(output: Any) -> list[Tensor]:
    """Every tensor of an output, in order; a cache of keys and values, which graphreg switches off, is none of it."""
    if isinstance(output, Tensor):
        return [output]
    if output is None or isinstance(output, (bool, int, float, str)):
        return []
    if isinstance(output, (tuple, list)):
        return [tensor for item in output for tensor in tensors(item)]
    if type(output).__name__.endswith("Cache"):
        return []
    items = output.values() if isinstance(output, Mapping) else vars(output).values()
    return [tensor for item in items for tensor in tensors(item)]


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def images(size: int, channels: int = 3, batch: int = 2) -> Inputs:
    return (numbers(batch, channels, size, size),)


def clips(frames: int, size: int, batch: int = 2) -> Inputs:
    return (numbers(batch, 3, frames, size, size),)


def one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].strip()}" if lines else type(error).__name__
