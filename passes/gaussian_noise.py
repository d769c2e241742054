"""Additive Gaussian noise."""

import math
from collections.abc import Sequence

from torch import Tensor

from graphreg import Noise, Splice


class GaussianNoise(Splice, keys=("noise",)):
    """Adds normal noise to each element.

    Formula: ``z + weight e``, where e is standard normal.
    Shapes: z [any shape], floating -> [same shape].

    Args:
        weight: The standard deviation of the noise, in the units of z, 0 or more.
        share_axes: The axes along which all elements share one e: ``"time"``, ``"batch"``, the number of an axis, or several of these.

    Draws: one e for each element.
    Default sites: the hidden values.
    Source: Bishop, Training with noise is equivalent to Tikhonov regularization, 1995, equation 2.
    """

    share_axes: str | int | Sequence[str | int] = ()

    raises_variance = True
    separable = "elements"

    def in_a_row(self, weights: Sequence[float]) -> str:
        # The variances of independent draws add up.
        return (
            f"the noise adds up to a standard deviation of {math.hypot(*weights):.3g} (if nothing in between scales it), not "
            f"{max(weights):.3g}"
        )

    def __call__(self, z: Tensor, weight: Tensor, noise: Noise) -> Tensor:
        return z + weight * noise.normal(z)
