"""Spatial dropout, which drops whole channels."""

import math
from collections.abc import Sequence

from torch import Tensor

from graphreg import Noise, Site, Splice


class ChannelDropout(Splice, keys=("channel_dropout",)):
    """Zeroes whole channels at random, and scales the others so that the expectation is preserved.

    Formula: ``z m / (1 - weight)``, where m is 0 with probability ``weight``, else 1.
    Shapes: z [batch, channels, one or more further axes], floating -> [same shape].

    Args:
        weight: The probability that a channel is zeroed, 0 <= weight < 1.

    Draws: one m for each channel of each example.
    Default sites: the hidden values that have the axes of a convolution's output.
    Source: Tompson, Goroshin, Jain, LeCun & Bregler, Efficient object localization using convolutional networks, CVPR 2015, section 3.2.
    PyTorch has this dropout as ``nn.Dropout1d``, ``nn.Dropout2d`` and ``nn.Dropout3d``, Keras as ``SpatialDropout2D``.
    """

    usual = "the hidden values that have the axes of a convolution's output"
    raises_variance = True
    separable = "elements"
    native_kinds = ("element", "channel")

    def check(self) -> None:
        self.require(0 <= self.weight < 1, "weight", "in [0, 1)")

    def defaults(self, sites: Sequence[Site]) -> list[Site]:
        return [site for site in super().defaults(sites) if site.is_map]

    def why_not(self, site: Site) -> str:
        if site.channels in (None, 1) or site.shape is None:
            return ""
        others = tuple(axis for axis in range(1, len(site.shape)) if axis != site.channels)
        return (
            f"the splice takes axis 1 for the channels, and the channels of the convolution are axis {site.channels} here. "
            f"Use BernoulliDropout with share_axes={others}, which drops whole channels of this value."
        )

    def unfit(self, shape: Sequence[int]) -> str:
        advice = "the splice takes [batch, channels, ...], 3 dims or more. For a value of 2 dims or fewer, use BernoulliDropout."
        return advice if len(shape) < 3 else ""

    def in_a_row(self, weights: Sequence[float]) -> str:
        return f"{math.prod(1 - p for p in weights):.3g} of it is kept, not {1 - max(weights):.3g}"

    def __call__(self, z: Tensor, weight: Tensor, noise: Noise) -> Tensor:
        return z * noise.keep(z, weight, shared=range(2, z.dim())) / (1 - weight)
