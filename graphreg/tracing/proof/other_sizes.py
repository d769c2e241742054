"""``other_sizes`` gives the arguments of a call other sizes, as those of the next batch may have them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from graphreg.torch_internals import pytree
from graphreg.tracing.fake_inputs import Arguments

_MOST = 2  # a group is two more pairs of calls


def other_sizes(call: Arguments, more: int = 1) -> Iterator[Arguments]:
    """Yield the call with ``more`` items more along all axes of one size, then along those among them at one position only.

    If ``more`` is negative, the last items are left out. New items are copies of the first one, so that indices stay valid. Axes of size 1,
    which broadcast, stay. A model may have a table of just the call's size. On a CPU, that is an error like others; on a GPU, it would end
    the process's use of the GPU, so there are no other sizes.
    """
    tensors = [leaf for leaf in pytree.tree_leaves(call) if _is_plain(leaf)]
    if any(tensor.device.type != "cpu" for tensor in tensors):
        return
    axes = dict.fromkeys((axis, size) for tensor in tensors for axis, size in enumerate(tensor.shape) if size > 1)
    groups = dict.fromkeys(tuple(each for each in axes if each[1] == size) for _, size in axes)
    for group in [*groups, *((each,) for each in axes if (each,) not in groups)][:_MOST]:
        grown: dict[int, Tensor] = {}

        def grow(leaf: Tensor, group: tuple[tuple[int, int], ...] = group, grown: dict[int, Tensor] = grown) -> Tensor:
            if _is_plain(leaf) and id(leaf) not in grown:
                larger = leaf.detach()
                for axis in [axis for axis, size in group if leaf.dim() > axis and leaf.shape[axis] == size]:
                    fewer = larger.narrow(axis, 0, larger.shape[axis] + min(more, 0))
                    larger = torch.cat([fewer, *[larger.narrow(axis, 0, 1)] * more], axis)
                grown[id(leaf)] = leaf if larger.shape == leaf.shape else larger.requires_grad_(leaf.requires_grad)
            return grown.get(id(leaf), leaf)

        args, kwargs = pytree.tree_map_only(Tensor, grow, call)
        yield args, kwargs


def _is_plain(value: object) -> bool:
    return type(value) is Tensor and value.layout is torch.strided and not value.is_nested and not value.is_quantized
