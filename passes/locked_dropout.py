"""Variational dropout for sequences, also known as locked dropout."""

import math
from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from graphreg import Noise, Splice


class LockedDropout(Splice, keys=("locked_dropout",)):
    """Zeroes units of a sequence at random, each at all steps of an example, and scales the others so that the expectation is preserved.

    Formula: ``z m / (1 - weight)``, where m is 0 with probability ``weight``, else 1.
    Shapes: z [batch, time, units], floating, or with another order or more axes -> [same shape].

    Args:
        weight: The probability that a unit is zeroed, 0 <= weight < 1.
        time_axis: The axis of time of a value that does not come from a recurrent layer. For the output of such a layer, the layer
            determines the axis.

    Draws: one m for each unit of each example; all steps share it.
    Default sites: the hidden values.
    Source: Gal & Ghahramani, A theoretically grounded application of dropout in recurrent neural networks, NIPS 2016, section 4.1. Merity
    et al., 2017, call it locked dropout.
    """

    time_axis: int = 1

    share_axes: ClassVar[tuple[str, ...]] = ("time",)

    def check(self) -> None:
        self.require(0 <= self.weight < 1, "weight", "in [0, 1)")

    def in_a_row(self, weights: Sequence[float]) -> str:
        return f"{math.prod(1 - p for p in weights):.3g} of it is kept, not {1 - max(weights):.3g}"

    def __call__(self, z: Tensor, weight: Tensor, noise: Noise) -> Tensor:
        return z * noise.keep(z, weight) / (1 - weight)
