"""``Window``: the place of a part in a whole tensor. Ranks that hold parts of one value draw parts of one mask."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from graphreg.errors import RandomnessError


@dataclass(frozen=True)
class Window:
    """The place of a part in a whole tensor.

    Attributes:
        shape: The shape of the whole.
        starts: The index of the part's first element along each axis of the whole.
        sizes: The shape of the part.
    """

    shape: tuple[int, ...]
    starts: tuple[int, ...]
    sizes: tuple[int, ...]

    def indices(self, sizes: Sequence[int], shared: Collection[int], device: torch.device) -> Tensor:
        """Return the row-major index, in the draw for the whole, of each element that the part draws: int64 [sizes].

        Args:
            sizes: The shape that the part draws: that of the part, with length 1 along the axes that share one draw.
            shared: These axes.
            device: The device of the result.

        Raises:
            RandomnessError: ``sizes`` is another shape, so that the place of the draw in the draw for the whole is not known.
        """
        expected = tuple(1 if axis in shared else size for axis, size in enumerate(self.sizes))
        if tuple(sizes) != expected:
            raise RandomnessError(
                f"a formula draws {tuple(sizes)} for a part {self.sizes} of a value {self.shape}; a part can only draw numbers for its own "
                "shape. Give the axes along which elements share a draw as noise.keep(z, p, shared=...), or leave the site out."
            )
        whole = tuple(1 if axis in shared else size for axis, size in enumerate(self.shape))
        index = torch.zeros((), dtype=torch.int64, device=device)
        for axis, size in enumerate(sizes):
            start = 0 if axis in shared else self.starts[axis]
            places = torch.arange(start, start + size, dtype=torch.int64, device=device) * math.prod(whole[axis + 1 :])
            index = index + places.view(-1, *(1,) * (len(sizes) - axis - 1))
        return index
