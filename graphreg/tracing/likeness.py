"""What two operations on fake tensors have in common only if their results have the same types, shapes and dtypes, as a key of a dict.

The layers of a deep model are alike, so that a trace that computes the values of the first knows those of the others.
"""

from __future__ import annotations

import operator
from collections.abc import Hashable, Mapping
from typing import Any

import torch
from torch import fx

_PLAIN = (int, float, bool, complex, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format, type(...))


def is_pure(function: Any) -> bool:
    """Return whether a function is one of Python's operators or of torch, and writes into no argument."""
    name, home = str(getattr(function, "__name__", "_")), str(getattr(function, "__module__", ""))
    writes = name.endswith("_") or name.startswith("set") or (home == "_operator" and name.startswith("i") and hasattr(operator, name[1:]))
    return not writes and home.partition(".")[0] in ("_operator", "builtins", "math", "torch")


def likeness_of_tensor(tensor: Any) -> Hashable:
    """Return what a tensor of the model has in common with those that are alike; None if somebody has set attributes on it."""
    return layout_key(tensor) if isinstance(tensor, torch.Tensor) and not vars(tensor) else None


def layout_key(tensor: torch.Tensor) -> Hashable:
    """Return how a tensor lies in memory, with its class, dtype and device."""
    lies = (tensor.stride(), tensor.storage_offset()) if tensor.layout is torch.strided else _Itself(tensor)
    return (type(tensor), tensor.shape, lies, tensor.dtype, tensor.device, tensor.requires_grad)


def likeness_of_module(module: torch.nn.Module) -> Hashable:
    """Return what two layers of torch have in common only if they do the same to shapes; None if that is not certain."""
    if not type(module).__module__.startswith("torch.nn.modules."):
        return None
    own = {name: value for name, value in vars(module).items() if name not in ("_parameters", "_buffers")}
    tensors = {**module._parameters, **module._buffers}
    of_tensors = (t if t is None else likeness_of_tensor(t) or _Itself(t) for t in tensors.values())
    return type(module), frozen(own, {}), tuple(tensors), tuple(of_tensors)


def frozen(value: Any, values: Mapping[fx.Node, Any]) -> Hashable:
    """Return a structure as a key of a dict: nodes by their values, data as it is, and other objects by identity."""
    kind = type(value)
    if kind in _PLAIN:
        return kind, value
    if kind is fx.Node:
        return frozen(values[value], values)
    if isinstance(value, (tuple, list)):
        return kind, tuple(frozen(each, values) for each in value)
    if isinstance(value, dict):
        return kind, tuple(value), tuple(frozen(each, values) for each in value.values())
    if kind is set:
        return kind, frozenset(value)
    if kind is slice:
        return frozen((value.start, value.stop, value.step), values)
    return _Itself(value)


class _Itself:
    """Stands for an object in a key: equal to what stands for the same object. It holds the object, so that no other gets its id."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Itself) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)
