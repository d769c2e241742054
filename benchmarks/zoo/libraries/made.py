"""Models made by rule: of a constructor's parameters, those that a table of small values knows by name get these values."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from zoo.providers import Inputs, Provider, try_out


@dataclass(frozen=True)
class Entry:
    """``make``: a model with random weights; ``inputs``: what it is called with; ``kind``: what it stands for."""

    make: Callable[[], nn.Module]
    inputs: Callable[[], Inputs]
    kind: str = ""


def known(make: Callable[..., Any], small: Mapping[str, Any], **own: Any) -> dict[str, Any]:
    """The arguments that ``make`` takes by a name that ``small`` has, and those of its own, which count more."""
    accepted = inspect.signature(make).parameters
    return {name: value for name, value in small.items() if name in accepted} | own


def provider(entries: Callable[[], Mapping[str, Entry]], left: Mapping[str, str] | None = None) -> Provider:
    """``entries`` is called when a model is asked for, since it imports the library."""

    def build(name: str) -> tuple[nn.Module, Inputs]:
        entry = entries()[name]
        torch.manual_seed(0)
        model, inputs = entry.make(), entry.inputs()
        try_out(model, inputs)
        return model.train(), inputs

    return Provider(lambda: {name: entry.kind for name, entry in entries().items()}, build, lambda: left or {})
