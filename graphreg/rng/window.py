"""``Window``: where a rank's part lies in a value that several ranks divide. With it, each rank draws its part of one common mask."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from graphreg.errors import RandomnessError


@dataclass(frozen=True)
class Window:
    """Where one rank's part of a value lies in the whole value.

    Attributes:
        shape: The shape of the whole value.
        starts: For each axis of the whole value, the index at which the part begins.
        sizes: The shape of the part.
    """

    shape: tuple[int, ...]
    starts: tuple[int, ...]
    sizes: tuple[int, ...]

    def indices(self, sizes: Sequence[int], shared: Collection[int], device: torch.device) -> Tensor:
        """Return, for each element of the draw for the part, its row-major index in the draw for the whole value: int64 [sizes].

        Args:
            sizes: The shape of the draw for the part: the part's own shape, but with length 1, if
                it is not empty, along the axes in ``shared``.
            shared: The axes along which all elements share one draw.
            device: The device of the result.

        Raises:
            RandomnessError: ``sizes`` is any other shape. Then it is not known which elements of
                the whole value the draw is for.
        """
        expected = tuple(min(size, 1) if axis in shared else size for axis, size in enumerate(self.sizes))
        if tuple(sizes) != expected:
            raise RandomnessError(
                f"a formula draws {tuple(sizes)} for a part {self.sizes} of a value {self.shape}; a part can only draw numbers for its own "
                "shape. Give the axes along which elements share a draw as noise.keep(z, p, shared=...), or leave the site out."
            )

        # A step along an axis skips as many elements of the whole draw as lie behind that axis.
        whole = tuple(1 if axis in shared else size for axis, size in enumerate(self.shape))
        index = torch.zeros((), dtype=torch.int64, device=device)
        for axis, size in enumerate(sizes):
            # Along a shared axis, all parts use the one element of the draw.
            start = 0 if axis in shared else self.starts[axis]
            places = torch.arange(start, start + size, dtype=torch.int64, device=device) * math.prod(whole[axis + 1 :])
            index = index + places.view(-1, *(1,) * (len(sizes) - axis - 1))
        return index
