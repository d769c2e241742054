"""Finds the tensors in nested values, records where each lies in memory, and saves and restores their contents."""

from __future__ import annotations

import copy
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graphreg.torch_internals.autograd import PRIVATE_ATTRIBUTES, storage_of, version_of
from graphreg.torch_internals.fake_tensors import FakeCopyMode, FakeTensorMode
from graphreg.torch_internals.functorch import is_wrapped
from graphreg.torch_internals.modules import buffers_by_name, parameters_by_name
from graphreg.torch_internals.torch_modes import without_functions

StorageKey = int  # identifies a storage
# attributes of a tensor that depend on earlier calls (a write, a step of an optimizer, a backward), on whether gradients are recorded, or
# on how the tensor was made (a view has a base). Many are None, which code tells from others by ``is``.
LEFT_IN_TENSORS = PRIVATE_ATTRIBUTES | {"grad", "grad_dtype", "grad_fn", "is_leaf", "output_nr", "retains_grad"}


def reads_what_is_left(name: str) -> str:
    """Return why a forward that reads an attribute of ``LEFT_IN_TENSORS`` cannot be traced."""
    return f"it reads .{name} of a tensor, which depends on earlier calls or on how the tensor was made, and not on its values"


@dataclass(frozen=True)
class TensorState:
    """Where a tensor lies in memory, and how often it was written into.

    Attributes:
        key: The key of the tensor's storage.
        geometry: The tensor's shape, strides and offset. Only the shape if the tensor is not
            strided or if a transform of torch.func has wrapped it; nothing if it is uninitialized.
        version: torch's version counter of the tensor, which each write in place increases.
    """

    key: StorageKey
    geometry: tuple[Any, ...]
    version: int

    @classmethod
    def all_of(cls, tensors: Iterable[Tensor]) -> list[TensorState]:
        """Return the present states of tensors. This is quicker than to ask for each by itself."""
        with without_functions():
            return [cls._read(tensor) for tensor in tensors]

    @classmethod
    def _read(cls, tensor: Tensor) -> TensorState:
        """Return the present state of a tensor, within ``without_functions()``."""
        strided = tensor.layout is torch.strided and not is_wrapped(tensor)
        geometry = (tensor.shape, tensor.stride(), tensor.storage_offset()) if strided else (tensor.shape,)
        return cls(storage_of(tensor), geometry, version_of(tensor))


class SavedTensor:
    """A copy of the content and geometry that a tensor has before an operation that may write into the tensor."""

    def __init__(self, tensor: Tensor) -> None:
        # in this order: otherwise torch.export would record the no_grad region
        with without_functions(), torch.no_grad():
            self.tensor, self.content = tensor, tensor.detach().clone()
            self.shape, self.stride, self.version = tensor.shape, tensor.stride(), version_of(tensor)
            self.offset = tensor.storage_offset() if tensor.layout is torch.strided else 0

    def restore(self) -> None:
        """Give the tensor the content and geometry that were saved."""
        with without_functions(), torch.no_grad():
            # ``t_()`` and ``resize_()``, for example, change the geometry, too
            if (self.tensor.shape, self.tensor.stride()) != (self.shape, self.stride):
                self.tensor.set_(self.tensor.untyped_storage(), self.offset, self.shape, self.stride)
            self.tensor.data.copy_(self.content)


def storage_key(tensor: Tensor) -> StorageKey:
    """Return a key of the tensor's storage, or of the tensor itself if it is sparse and has no storage."""
    with without_functions():
        return storage_of(tensor)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested arguments. Proxies of torch.fx are not among them."""
    for _, tensor in tensors_by_path(value):
        yield tensor


def tensors_by_path(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Tensor]]:
    """Yield each tensor in a nested value with its path: the indices and keys that lead to it."""
    kind = type(value)
    if issubclass(kind, Tensor):
        yield path, value
    elif issubclass(kind, (tuple, list)):
        for i, item in enumerate(value):
            yield from tensors_by_path(item, (*path, i))
    elif kind is dict:
        for key, item in value.items():
            yield from tensors_by_path(item, (*path, key))
    elif kind is slice:
        yield from tensors_by_path((value.start, value.stop, value.step), path)


def with_attributes(made: Tensor, original: Tensor) -> Tensor:
    """Give a copy of a tensor the attributes that somebody has set on the original, and return the copy."""
    if (attributes := vars(original)) and type(original) in (Tensor, nn.Parameter, nn.Buffer):
        vars(made).update({name: value for name, value in attributes.items() if name not in vars(made)})
    return made


def require_own_parameters(module: nn.Module, path: str, own: Container[int], names: Container[str]) -> None:
    """Raise TypeError if the forward calls a module with other parameters than its own.

    ``own``, ``names``: the ids and names of the model's parameters. A layer that a module makes at its first call has others.
    """
    for inner, each in module.named_modules():
        others = [name for name, parameter in each._parameters.items() if parameter is not None and id(parameter) not in own]
        if any(".".join(filter(None, (path, inner, name))) in names for name in others):
            raise TypeError(
                f"it calls {path} with other parameters than its own, as torch.func.functional_call does, and a graph would call it with "
                "its own"
            )


def with_their_attributes(twin: nn.Module, model: nn.Module) -> nn.Module:
    """Give the parameters and buffers of a copy the attributes that those of the model have, which ``copy.deepcopy`` leaves out."""
    for by_name in (parameters_by_name, buffers_by_name):
        for made, original in zip(by_name(twin).values(), by_name(model).values(), strict=False):
            with_attributes(made, original)
    return twin


def fake_copy(module: nn.Module, fake: FakeTensorMode) -> nn.Module:
    """Return a deep copy of a module on fake tensors. No data is copied."""
    own = (*parameters_by_name(module).values(), *buffers_by_name(module).values())
    usual = [each for each in own if type(each) in (nn.Parameter, torch.Tensor) and each.is_leaf and each.layout == torch.strided]
    # ``deepcopy`` gets the usual tensors as fake ones, and makes fake copies of the others
    memo: dict[int, Any] = {id(each): fake.from_tensor(each) for each in usual}
    with FakeCopyMode(fake):
        return with_their_attributes(copy.deepcopy(module, memo), module)
