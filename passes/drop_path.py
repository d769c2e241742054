"""Stochastic depth, also known as drop path."""

import math
from collections.abc import Sequence

from torch import Tensor

from graphreg import Noise, Site, Splice


class DropPath(Splice, keys=("drop_path", "stochastic_depth")):
    """Zeroes residual branches at random, and scales the others so that the expectation is preserved.

    Formula: ``z m / (1 - weight)``, where m is 0 with probability ``weight``, else 1.
    Shapes: z [batch, any further axes], floating -> [same shape].

    Args:
        weight: The probability that a branch is zeroed, 0 <= weight < 1.
        batch_axis: The axis of examples: 0, or 1 where the first axis is time. Near a layer of [time, batch, ...], 0 is refused.

    Draws: one m for each example.
    Default sites: the residual branches, ``**#branch``. In ``x + f(x)``, the value ``f(x)`` is the branch.
    Source: Huang, Sun, Liu, Sedra & Weinberger, Deep networks with stochastic depth, ECCV 2016, sections 3 and 4. The paper drops a branch
    for the whole batch, and scales the branch in eval mode. Like timm's ``DropPath`` and torchvision's ``stochastic_depth``, this class
    draws for each example, and scales the branch in train mode.
    """

    batch_axis: int = 0

    usual = "the residual branches, **#branch"
    separable = "elements"
    native_kinds = ("depth",)

    def check(self) -> None:
        self.require(0 <= self.weight < 1, "weight", "in [0, 1)")
        self.require(type(self.batch_axis) is int, "batch_axis", "the number of an axis, a whole number")

    def defaults(self, sites: Sequence[Site]) -> list[Site]:
        return [site for site in sites if site.branch]

    def unfit(self, shape: Sequence[int]) -> str:
        if -len(shape) <= self.batch_axis < len(shape):
            return ""
        return f"batch_axis={self.batch_axis} is not an axis of the value. Give the number of the axis of examples, or leave the site out."

    def in_a_row(self, weights: Sequence[float]) -> str:
        return f"{math.prod(1 - p for p in weights):.3g} of it is kept, not {1 - max(weights):.3g}"

    def __call__(self, z: Tensor, weight: Tensor, noise: Noise) -> Tensor:
        others = [axis for axis in range(z.dim()) if axis != self.batch_axis % z.dim()]
        return z * noise.keep(z, weight, shared=others) / (1 - weight)
