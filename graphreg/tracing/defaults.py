"""The defaults of a forward's arguments, and numbers, as the graph's code has them."""

from __future__ import annotations

import inspect
from enum import Enum
from numbers import Number
from typing import Any

import torch
from torch import fx

from graphreg.torch_internals.emitted_code import DEFAULT
from graphreg.tracing.side_effects.stand_ins import ChangingNumber

_WITH_TEXT = (float, int, bool, complex, str, bytes, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)


def placeholder_default(parameter: inspect.Parameter) -> tuple[Any, ...]:
    """Return the default of a placeholder, as the arguments of its node: none if the parameter has no default.

    The emitted code must write it as text, and a tensor, a function or an object has none. Such a
    default becomes None. That is only for show: an argument whose default is a tensor gets it from
    ``keep_default``, and the others are specialized.
    """
    if parameter.default is parameter.empty:
        return ()
    return (parameter.default if _has_text(parameter.default) else None,)


def keep_default(placeholder: fx.Node, parameter: inspect.Parameter) -> None:
    """Note a default that is a tensor at the placeholder, from where the forward gets it when its code is generated."""
    if isinstance(parameter.default, torch.Tensor):
        placeholder.meta[DEFAULT] = parameter.default


def plain_value(value: Any) -> Any:
    """Return what a number or string of a class of its own, such as one of numpy, is to an operation; None for any other value.

    The code of a graph writes values as ``repr`` does, and for such a value that may be a name that
    the code does not know.
    """
    # whose plain value no graph may have
    if isinstance(value, Enum) or type(value) is ChangingNumber:
        return None
    if type(value).__module__ == "numpy" and isinstance(value, Number):
        return value.item()  # type: ignore[attr-defined]
    plain = next((kind for kind in (int, float, complex, str) if isinstance(value, kind) and type(value) not in (kind, bool)), None)
    return None if plain is None else getattr(plain, f"__{plain.__name__}__")(value)


def _has_text(value: Any) -> bool:
    """Return whether the code of a graph can have a value as a default: plain data, and tuples, lists and dicts of it."""
    if type(value) in (tuple, list):
        return all(map(_has_text, value))
    if type(value) is dict:
        return all(map(_has_text, value)) and all(map(_has_text, value.values()))
    return type(value) in _WITH_TEXT
