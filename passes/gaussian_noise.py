"""Additive Gaussian noise: Bishop, Training with noise is equivalent to Tikhonov regularization, 1995, equation 2."""

import math
from collections.abc import Sequence

from torch import Tensor

from graphreg import Noise, Splice


class GaussianNoise(Splice, keys=("noise",)):
    """Adds independent normal noise of standard deviation ``weight`` to each element.

    z: [any shape], floating -> [same shape]. ``weight`` is in the units of z, weight >= 0.

    Attributes:
        share_axes: Axes along which all elements get the same noise: ``"time"``, ``"batch"``, the number of an axis, or several of these.
    """

    share_axes: str | int | Sequence[str | int] = ()

    def in_a_row(self, weights: Sequence[float]) -> str:
        return f"noise is added each time, {math.hypot(*weights):.3g} in all where nothing scales it in between, not {max(weights):.3g}"

    def __call__(self, z: Tensor, weight: Tensor, noise: Noise) -> Tensor:
        return z + weight * noise.normal(z)
