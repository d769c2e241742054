"""Dropout: Srivastava et al., JMLR 15 (2014), section 4; inverted: it scales in training, and eval mode needs nothing."""

import math
from collections.abc import Sequence

from torch import Tensor

from graphreg import Noise, Splice


class BernoulliDropout(Splice, keys=("dropout",)):
    """Zeroes each element with probability ``weight``; scales the rest by ``1 / (1 - weight)``.

    z: [any shape], floating -> [same shape]. ``weight`` is a probability, 0 <= weight < 1.
    """

    def check(self) -> None:
        self.require(0 <= self.weight < 1, "weight", "in [0, 1)")

    def in_a_row(self, weights: Sequence[float]) -> str:
        return f"{math.prod(1 - p for p in weights):.3g} of it is kept, not {1 - max(weights):.3g}"

    def __call__(self, z: Tensor, weight: Tensor, noise: Noise) -> Tensor:
        keep, scale = noise.keep(z, weight), 1 / (1 - weight)
        # The same numbers either way. What is kept for backward is the other factor: eager, one tensor and one product in
        # backward; compiled, a mask of 1 byte an element, not the scaled one of 4.
        return z * keep.mul_(scale) if keep.is_floating_point() else z * keep * scale
