"""Alpha dropout, for SELU networks: Klambauer, Unterthiner, Mayr & Hochreiter, Self-normalizing neural networks, NIPS 2017, section 2."""

from collections.abc import Sequence

from torch import Tensor

from graphreg import Noise, Splice

LOW = -1.7580993408473766  # the value of SELU at minus infinity, alpha' in the paper


class AlphaDropout(Splice, keys=("alpha_dropout",)):
    """Sets each element to SELU's lowest value with probability ``weight``, then scales and shifts: mean 0 and variance 1 are preserved.

    z: [any shape], floating -> [same shape]: ``a (z m + low (1 - m)) + b`` with m = 1 where an element is kept. ``weight`` is a
    probability, 0 <= weight < 1. It belongs after a SELU; the output of any other activation has other lowest values.

    Attributes:
        share_axes: Axes along which elements are dropped together: ``"time"``, ``"batch"``, the number of an axis, or several of these.
    """

    share_axes: str | int | Sequence[str | int] = ()

    def check(self) -> None:
        self.require(0 <= self.weight < 1, "weight", "in [0, 1)")

    def __call__(self, z: Tensor, weight: Tensor, noise: Noise) -> Tensor:
        keep = noise.keep(z, weight)
        a = ((1 - weight) * (1 + weight * LOW**2)) ** -0.5
        b = -a * weight * LOW
        return a * (z * keep + LOW * (1 - keep).to(z.dtype)) + b
