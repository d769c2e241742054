"""Alpha dropout, for networks with SELU activations."""

from collections.abc import Sequence

from torch import Tensor

from graphreg import Noise, Splice

LOW = -1.7580993408473766  # the limit of SELU at minus infinity, alpha' in the paper


class AlphaDropout(Splice, keys=("alpha_dropout",)):
    """Sets elements to SELU's lowest value, then scales and shifts all elements so that a mean of 0 and a variance of 1 are preserved.

    Formula: ``a (z m + LOW (1 - m)) + b``, where m is 0 with probability ``weight``, else 1. LOW = -1.758 is SELU's lowest value; a and b
    depend on ``weight`` alone.
    Shapes: z [any shape], floating -> [same shape]. Select outputs of SELU: other activations have another lowest value.

    Args:
        weight: The probability that an element is set to the lowest value, 0 <= weight < 1.
        share_axes: The axes along which all elements share one m: ``"time"``, ``"batch"``, the number of an axis, or several of these.

    Draws: one m for each element.
    Default sites: the hidden values.
    Source: Klambauer, Unterthiner, Mayr & Hochreiter, Self-normalizing neural networks, NIPS 2017, section 2.
    """

    share_axes: str | int | Sequence[str | int] = ()

    separable = "elements"

    def check(self) -> None:
        self.require(0 <= self.weight < 1, "weight", "in [0, 1)")

    def __call__(self, z: Tensor, weight: Tensor, noise: Noise) -> Tensor:
        keep = noise.keep(z, weight)
        # a makes the variance 1 again, and b the mean 0.
        # LOW**2 as a literal: with dynamic=True, Dynamo takes a global number as an input of the graph, which has no power (torch 2.13).
        a = ((1 - weight) * (1 + weight * 3.09091329228798)) ** -0.5
        b = -a * weight * LOW
        return a * (z * keep + LOW * (1 - keep).to(z.dtype)) + b
