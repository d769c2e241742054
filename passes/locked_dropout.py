"""Variational dropout for sequences, also known as locked dropout."""

import math
from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from graphreg import Noise, Splice


class LockedDropout(Splice, keys=("locked_dropout",)):
    """Zeroes units of a sequence at random, the same units at all steps, and scales the others so that the expectation is preserved.

    Formula: ``z m / (1 - weight)``, where m is 0 with probability ``weight``, else 1.
    Shapes: z [batch, time, units], also in another order or with more axes, floating -> [same shape].

    Args:
        weight: The probability that a unit is zeroed, 0 <= weight < 1.
        time_axis: The axis of time in a value. For the output of a recurrent layer, leave it out: ``batch_first`` of the layer determines
            the axis.

    Draws: one m for each unit of each example. All steps share the draw.
    Default sites: the hidden values.
    Source: Gal & Ghahramani, A theoretically grounded application of dropout in recurrent neural networks, NIPS 2016, section 4.1.
    Merity et al., 2017, call this method locked dropout.
    """

    time_axis: int = 1

    # A ClassVar, so that it is no option: steps that do not share a draw are BernoulliDropout.
    share_axes: ClassVar[tuple[str, ...]] = ("time",)

    raises_variance = True
    separable = "elements"
    native_kinds = ("element", "channel")

    def check(self) -> None:
        self.require(0 <= self.weight < 1, "weight", "in [0, 1)")

    def in_a_row(self, weights: Sequence[float]) -> str:
        return f"{math.prod(1 - p for p in weights):.3g} of it is kept, not {1 - max(weights):.3g}"

    def __call__(self, z: Tensor, weight: Tensor, noise: Noise) -> Tensor:
        return z * noise.keep(z, weight) / (1 - weight)
