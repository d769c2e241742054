"""The defaults of a forward's arguments, as the graph's code has them."""

from __future__ import annotations

import inspect
from typing import Any

import torch

_WITH_TEXT = (float, int, bool, complex, str, bytes, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)


def placeholder_default(parameter: inspect.Parameter) -> tuple[Any, ...]:
    """Return the default of a placeholder, as the arguments of its node: none if the parameter has no default.

    The emitted code must write it as text, and a function or an object has none. Such a default becomes None. It is only for show: the
    argument is specialized, so that a call without it means the value that the graph was made for.
    """
    if parameter.default is parameter.empty:
        return ()
    return (parameter.default if _has_text(parameter.default) else None,)


def _has_text(value: Any) -> bool:
    """Return whether the code of a graph can have a value as a default: plain data, and tuples, lists and dicts of it, or a tensor."""
    if type(value) in (tuple, list):
        return all(map(_has_text, value))
    if type(value) is dict:
        return all(map(_has_text, value)) and all(map(_has_text, value.values()))
    return type(value) in _WITH_TEXT or isinstance(value, torch.Tensor)
