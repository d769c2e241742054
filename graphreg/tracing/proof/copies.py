"""Copies tensors and arguments so that what a forward writes into the copies does not reach the originals."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from graphreg.ir.contents import may_change
from graphreg.torch_internals import pytree
from graphreg.torch_internals.autograd import storage_number
from graphreg.tracing.tensors import with_attributes


def tensor_copies(tensors: Iterable[Tensor]) -> dict[int, Tensor]:
    """Return a detached copy of each tensor, by the id of the tensor.

    Copies have the strides and attributes of the originals, and share storage as they do. A copy
    requires gradients where the original does, and is a leaf of autograd where the original is one.
    """
    originals = {id(tensor): tensor for tensor in tensors}
    storages = Counter(number for each in originals.values() if (number := _storage(each)) is not None)
    memo: dict[int, Any] = {}
    shared = {key: storages.get(_storage(tensor), 0) > 1 for key, tensor in originals.items()}  # type: ignore[arg-type]
    return {key: with_attributes(_copied(tensor, shared[key], memo), tensor) for key, tensor in originals.items()}


def _storage(tensor: Tensor) -> int | None:
    """Return the number of the tensor's storage; None for a tensor that is not strided or is of a subclass."""
    plain = type(tensor) in (Tensor, nn.Parameter, nn.Buffer) and tensor.layout is torch.strided and not tensor.is_nested
    return storage_number(tensor) if plain else None


def _copied(tensor: Tensor, shares: bool, memo: dict[int, Any]) -> Tensor:
    if tensor.is_nested:
        return tensor.detach().clone().requires_grad_(tensor.requires_grad)

    if _storage(tensor) is None or tensor.is_quantized:
        with suppress(Exception):
            return copy.deepcopy(tensor.detach() if type(tensor) is Tensor else tensor, memo)
        with suppress(Exception):  # a class without ``new_empty``
            clone = tensor.detach().clone().requires_grad_(tensor.requires_grad)
            if type(clone) is type(tensor):
                clone.__dict__.update(tensor.__dict__)
                return clone
        return tensor  # a tensor of a class that cannot be copied: both runs get the original

    plain = tensor.detach()
    if shares:
        new: Tensor = copy.deepcopy(plain, memo)
    else:
        # the smallest stretch of memory that has all elements: a batch may be a view of a whole
        # data set
        extent = 1 + sum((size - 1) * stride for size, stride in zip(plain.shape, plain.stride(), strict=True)) if plain.numel() else 0
        new = plain.as_strided((extent,), (1,)).clone().as_strided(plain.shape, plain.stride(), 0)

    if tensor.requires_grad:
        new = new.requires_grad_() if tensor.is_leaf else new.requires_grad_().clone()
    return nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new


def copied_call(call: tuple[tuple[Any, ...], dict[str, Any]], known: Mapping[int, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a call with copies of their tensors, containers and objects. Modules, functions and the like are shared.

    ``known``: what stands for an object in the copy, by the id of the object.
    """
    leaves = [leaf for leaf in pytree.tree_leaves(call) if isinstance(leaf, Tensor) and id(leaf) not in known]
    copies: dict[int, Any] = {**known, **tensor_copies(leaves)}

    def copied(leaf: Any) -> Any:
        if id(leaf) not in copies:
            copies[id(leaf)] = leaf
            if may_change(leaf) and not isinstance(leaf, nn.Module) and not callable(leaf):
                # where that fails, as for an object with a lock, both runs get the original
                with suppress(Exception):
                    del copies[id(leaf)]
                    copies[id(leaf)] = copy.deepcopy(leaf, dict(copies))
        return copies.get(id(leaf), leaf)

    args, kwargs = pytree.tree_map_only(object, copied, call)
    return args, kwargs
