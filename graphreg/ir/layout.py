"""Memory layout of tensors: density, overlap, and copies that preserve strides.

Whether ``contiguous``, ``reshape`` or ``to`` give a view or a copy depends on strides, and so does what a later write reaches.
``torch.clone`` keeps the strides of dense tensors alone: a slice, and what is expanded, it makes contiguous.
"""

from __future__ import annotations

import torch
from torch import Tensor

from graphreg.errors import RegularizerError


def is_dense(z: Tensor) -> bool:
    """Whether the elements fill a stretch of the storage, each place once: then ``torch.clone`` keeps the strides."""
    return z.layout is not torch.strided or z.is_contiguous() or _axes_are_separate(z, gaps=False)


def overlaps(z: Tensor) -> bool:
    """Whether elements may share a place in memory, as in an expanded or unfolded tensor."""
    return z.layout is torch.strided and not z.is_contiguous() and not _axes_are_separate(z, gaps=True)


def _axes_are_separate(z: Tensor, gaps: bool) -> bool:
    """Whether each axis, from the smallest stride on, begins where the ones before it end, or behind that if ``gaps`` are allowed.

    Dynamo traces this with sizes that it does not know, which it compares and does not sort.
    """
    axes = [(stride, size) for stride, size in zip(z.stride(), z.shape, strict=True) if size != 1]
    for i, (stride, _) in enumerate(axes):
        end = 1
        for j, (other, size) in enumerate(axes):
            if other < stride or (other == stride and j < i):
                end += other * (size - 1)
        if stride < end or (stride != end and not gaps):
            return False
    return True


def laid_out(y: Tensor, z: Tensor) -> Tensor:
    """``y`` in a storage of its own, with the strides of ``z``, of the same shape and dtype, no elements of which overlap."""
    return z.new_empty_strided(z.shape, z.stride()).copy_(y)


def apart(y: Tensor, z: Tensor) -> Tensor:
    """A copy of ``y``, which replaces ``z``; but ``z`` itself if it is not replaced, so that a write into it still reaches its owner."""
    return y if y is z else clone(y)


def clone(z: Tensor) -> Tensor:
    """A copy with the same strides, also where these leave gaps or have elements share their place."""
    if not isinstance(z, Tensor):
        raise RegularizerError(
            f"a value that is measured or replaced is a {type(z).__name__}, not a tensor. Select a part by its port (:0), or give "
            "example_inputs, by which graphreg sees what each value is."
        )
    if is_dense(z):
        return torch.clone(z)
    once = z
    for axis, (stride, size) in enumerate(zip(z.stride(), z.shape, strict=True)):
        if stride == 0 and size != 1:
            once = once.narrow(axis, 0, 1)
    return laid_out(once, once).expand(z.shape)
