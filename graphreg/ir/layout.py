"""Memory layout of tensors: density, overlap, and copies that preserve strides.

Strides decide whether ``contiguous``, ``reshape`` or ``to`` return a view or a copy, and therefore
which values a later write changes. ``torch.clone`` keeps the strides of dense tensors only: its
copy of a slice or of an expanded tensor has other strides.
"""

from __future__ import annotations

import torch
from torch import Tensor

from graphreg.errors import RegularizerError


def is_dense(z: Tensor) -> bool:
    """Return whether ``torch.clone`` keeps the strides: no two elements share a place in memory, and no place between them is empty."""
    return z.layout is not torch.strided or z.is_contiguous() or _axes_are_separate(z, gaps=False)


def overlaps(z: Tensor) -> bool:
    """Return whether elements may share a place in memory, like those of an expanded or unfolded tensor."""
    return z.layout is torch.strided and not z.is_contiguous() and not _axes_are_separate(z, gaps=True)


def _axes_are_separate(z: Tensor, gaps: bool) -> bool:
    """Return whether no two elements share a place in memory and, unless ``gaps`` are allowed, no place between them is empty.

    In order of increasing stride, the stride of each axis must be the extent of the axes before it,
    or more if ``gaps`` are allowed. The axes are compared in pairs, because Dynamo can compare
    symbolic sizes, but cannot sort them.
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
    """Return a copy of ``y`` with the strides of ``z``. ``z`` has the same shape and dtype as ``y``, and no overlapping elements."""
    return z.new_empty_strided(z.shape, z.stride()).copy_(y)


def apart(y: Tensor, z: Tensor) -> Tensor:
    """Return a copy of ``y``, the replacement of ``z``.

    If ``y`` is ``z`` itself, nothing is replaced. Then return ``z`` without a copy, because a later
    write must still reach its storage.
    """
    return y if y is z else clone(y)


def clone(z: Tensor) -> Tensor:
    """Return a copy with the same strides, even if there are gaps between elements, or elements share a place in memory."""
    if not isinstance(z, Tensor):
        raise RegularizerError(
            f"a value that is measured or replaced is a {type(z).__name__}, not a tensor. Select a part by its port (:0), or give "
            "example_inputs, from which graphreg learns what each value is."
        )
    if is_dense(z):
        return torch.clone(z)
    distinct = z  # without the repetitions of expanded axes
    for axis, (stride, size) in enumerate(zip(z.stride(), z.shape, strict=True)):
        if stride == 0 and size != 1:
            distinct = distinct.narrow(axis, 0, 1)
    return laid_out(distinct, distinct).expand(z.shape)
