"""Dropout: Srivastava et al., JMLR 15 (2014), section 4; inverted: it scales in train mode, and does nothing in eval mode."""

import math
from collections.abc import Sequence

from torch import Tensor

from graphreg import Noise, Splice


class BernoulliDropout(Splice, keys=("dropout",)):
    """Zeroes each element with probability ``weight``; scales the rest by ``1 / (1 - weight)``.

    z: [any shape], floating -> [same shape]. ``weight`` is a probability, 0 <= weight < 1.

    Attributes:
        share_axes: Axes along which elements are zeroed together: ``"time"``, ``"batch"``, the number of an axis, or several of these.
    """

    share_axes: str | int | Sequence[str | int] = ()

    def check(self) -> None:
        self.require(0 <= self.weight < 1, "weight", "in [0, 1)")

    def in_a_row(self, weights: Sequence[float]) -> str:
        return f"{math.prod(1 - p for p in weights):.3g} of it is kept, not {1 - max(weights):.3g}"

    def __call__(self, z: Tensor, weight: Tensor, noise: Noise) -> Tensor:
        keep, scale = noise.keep(z, weight), 1 / (1 - weight)
        # Both branches give the same numbers; they differ in what autograd saves for the gradient of z. In eager it is the scaled mask, so
        # that backward is one product. Compiled it is the int8 mask, which has 1 byte an element where the scaled one has 4.
        return z * keep.mul_(scale) if keep.is_floating_point() else z * keep * scale
