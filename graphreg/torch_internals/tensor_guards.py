"""Dynamo's guards on tensors, which compare shapes, dtypes and devices in C++."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn


def tensor_guard(tensors: Sequence[Tensor]) -> Callable[..., bool] | None:
    """Return a function that takes these tensors and returns True only if their shapes, dtypes and devices are as they are now.

    It may return False although these are the same, for example under another autocast. None if torch has no such function for them.
    """
    unique = len(set(map(id, tensors))) == len(tensors)
    if not unique or not all(type(tensor) in (Tensor, nn.Parameter) for tensor in tensors):
        return None
    try:
        from torch._C._dynamo.guards import TensorGuards  # noqa: PLC0415  # a private name, which a version of torch may lack

        sizes: Any = [list(tensor.shape) for tensor in tensors]
        strides: Any = [[None] * tensor.dim() for tensor in tensors]
        check: Callable[..., bool] = TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check
        return check if check(*tensors) else None
    except Exception:  # a version of torch with another form of guards: the caller then compares in Python
        return None
