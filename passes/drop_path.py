"""Stochastic depth: Huang, Sun, Liu, Sedra & Weinberger, Deep networks with stochastic depth, ECCV 2016, sections 3 and 4.

The paper skips a block for a whole batch, and scales it in eval mode. Here, as in timm's ``DropPath`` and torchvision's
``stochastic_depth``, each example has a draw of its own, and what is kept is scaled in train mode.
"""

import math
from collections.abc import Sequence

from torch import Tensor

from graphreg import Noise, Site, Splice


class DropPath(Splice, keys=("drop_path", "stochastic_depth")):
    """Zeroes a residual branch of each example as a whole, with probability ``weight``; scales the rest by ``1 / (1 - weight)``.

    z: [batch, any further axes], floating -> [same shape]. ``weight`` is a probability, 0 <= weight < 1. By default it acts on the
    residual branches: the values that a sum adds to the value that they were computed from, ``**#branch``.

    Attributes:
        batch_axis: The axis of examples, 1 for a model that has the axis of time first.
    """

    batch_axis: int = 0

    usual = "the residual branches, **#branch"

    def check(self) -> None:
        self.require(0 <= self.weight < 1, "weight", "in [0, 1)")
        self.require(type(self.batch_axis) is int, "batch_axis", "the number of an axis, a whole number")

    def defaults(self, sites: Sequence[Site]) -> list[Site]:
        return [site for site in sites if site.branch]

    def unfit(self, shape: Sequence[int]) -> str:
        if -len(shape) <= self.batch_axis < len(shape):
            return ""
        return f"batch_axis={self.batch_axis} is no axis of it. Give the number of its axis of examples, or leave the site out."

    def in_a_row(self, weights: Sequence[float]) -> str:
        return f"{math.prod(1 - p for p in weights):.3g} of it is kept, not {1 - max(weights):.3g}"

    def __call__(self, z: Tensor, weight: Tensor, noise: Noise) -> Tensor:
        others = [axis for axis in range(z.dim()) if axis != self.batch_axis % z.dim()]
        return z * noise.keep(z, weight, shared=others) / (1 - weight)
