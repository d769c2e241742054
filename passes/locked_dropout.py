"""Variational dropout in recurrent networks: Gal & Ghahramani, NIPS 2016, section 4.1; "locked dropout" in Merity et al., 2017."""

import math
from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from graphreg import Noise, Splice


class LockedDropout(Splice, keys=("locked_dropout",)):
    """Dropout with one mask for all steps of a sequence: a unit is zeroed at every step, with probability ``weight``, or at none.

    z: [batch, time, units] or with other order or more axes, floating -> [same shape]; kept units are scaled by ``1 / (1 - weight)``.
    ``weight`` is a probability, 0 <= weight < 1. The output of a recurrent layer tells its own axis of time.

    Attributes:
        time_axis: The axis of time, for a value that does not come from a recurrent layer.
    """

    time_axis: int = 1

    share_axes: ClassVar[tuple[str, ...]] = ("time",)

    def check(self) -> None:
        self.require(0 <= self.weight < 1, "weight", "in [0, 1)")

    def in_a_row(self, weights: Sequence[float]) -> str:
        return f"{math.prod(1 - p for p in weights):.3g} of it is kept, not {1 - max(weights):.3g}"

    def __call__(self, z: Tensor, weight: Tensor, noise: Noise) -> Tensor:
        return z * noise.keep(z, weight) / (1 - weight)
