"""Tensors: those found in nested values, where each lies in memory, and what it holds put back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graphreg.torch_internals import is_wrapped, storage_number, version_of, without_functions

Key = int  # of a storage


@dataclass(frozen=True)
class Lie:
    """Where a tensor lies, and how often it was written into."""

    key: Key
    geometry: tuple[Any, ...]
    version: int

    @classmethod
    def of(cls, tensor: Tensor) -> Lie:
        with without_functions():
            if nn.parameter.is_lazy(tensor):  # it has no shape yet, and torch raises where it is asked for one
                return cls(id(tensor), (), 0)
            strided = tensor.layout is torch.strided and not is_wrapped(tensor)
            geometry = (tensor.shape, tensor.stride(), tensor.storage_offset()) if strided else (tensor.shape,)
            return cls(key_of(tensor), geometry, version_of(tensor))


class Saved:
    """A tensor that is not the forward's own, as it is before an operation."""

    def __init__(self, tensor: Tensor) -> None:
        with without_functions(), torch.no_grad():  # in this order: torch.export writes regions down
            self.tensor, self.content = tensor, tensor.detach().clone()
            self.shape, self.stride, self.version = tensor.shape, tensor.stride(), version_of(tensor)
            self.offset = tensor.storage_offset() if tensor.layout is torch.strided else 0

    def put_back(self) -> None:
        with without_functions(), torch.no_grad():
            if (self.tensor.shape, self.tensor.stride()) != (self.shape, self.stride):
                self.tensor.set_(self.tensor.untyped_storage(), self.offset, self.shape, self.stride)
            self.tensor.data.copy_(self.content)


def key_of(tensor: Tensor) -> Key:
    """The storage of a tensor; one without a storage (sparse) stands for itself."""
    try:
        with without_functions():
            return storage_number(tensor)
    except (NotImplementedError, RuntimeError):
        return id(tensor)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in nested arguments that are no traced values."""
    for _, tensor in parts_of(value):
        yield tensor


def parts_of(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Tensor]]:
    kind = type(value)
    if issubclass(kind, Tensor):
        yield path, value
    elif issubclass(kind, (tuple, list)):
        for i, item in enumerate(value):
            yield from parts_of(item, (*path, i))
    elif kind is dict:
        for key, item in value.items():
            yield from parts_of(item, (*path, key))
    elif kind is slice:
        yield from parts_of((value.start, value.stop, value.step), path)
