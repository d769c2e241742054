"""Dropout."""

import math
from collections.abc import Sequence

from torch import Tensor

from graphreg import Noise, Splice


class BernoulliDropout(Splice, keys=("dropout",)):
    """Zeroes elements at random, and scales the others so that the expectation is preserved.

    Formula: ``z m / (1 - weight)``, where m is 0 with probability ``weight``, else 1.
    Shapes: z [any shape], floating -> [same shape].

    Args:
        weight: The probability that an element is zeroed, 0 <= weight < 1.
        share_axes: The axes along which all elements share one m: ``"time"``, ``"batch"``, the number of an axis, or several of these.

    Draws: one m for each element.
    Default sites: the hidden values.
    Source: Srivastava et al., Dropout: A simple way to prevent neural networks from overfitting, JMLR 15 (2014), section 4. The paper
    scales the weights in eval mode; here the values are scaled in train mode (inverted dropout).
    """

    share_axes: str | int | Sequence[str | int] = ()

    raises_variance = True
    separable = "elements"
    native_kinds = ("element", "channel")

    def check(self) -> None:
        self.require(0 <= self.weight < 1, "weight", "in [0, 1)")

    def in_a_row(self, weights: Sequence[float]) -> str:
        return f"{math.prod(1 - p for p in weights):.3g} of it is kept, not {1 - max(weights):.3g}"

    def __call__(self, z: Tensor, weight: Tensor, noise: Noise) -> Tensor:
        keep, scale = noise.keep(z, weight), (1 - weight).reciprocal()
        # Both branches compute the same numbers, but autograd saves different tensors for the gradient of z. In eager mode, autograd saves
        # the scaled mask, so that backward is one product. In compiled code, the mask is int8. There autograd saves the int8 mask, which
        # has a quarter of the size of a float32 mask.
        return z * keep.mul_(scale) if keep.is_floating_point() else z * keep * scale
