"""DropBlock."""

import math
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from graphreg import Noise, Site, Splice


class DropBlock(Splice, keys=("drop_block",)):
    """Zeroes square blocks in each channel at random, and divides the other elements by the share that is kept.

    Formula: ``z m / mean(m)``, where m is 0 in the blocks, else 1, and the mean is over the whole value. A map is one channel of one
    example. With the probability of the paper's equation 1, an element of a map is the top left corner of a block; only elements whose
    block lies within the map can be corners. So about the share ``weight`` of all elements is zeroed. Blocks may overlap.
    Shapes: z [batch, channels, height, width], floating -> [same shape].

    Args:
        weight: The share of elements to zero, 0 <= weight < 1.
        block_size: The height and the width of a block. A block may be no larger than the map. 1 drops single elements.

    Draws: in each map, one number for each element that can be a corner.
    Default sites: the hidden values that have the axes of a 2d convolution's output, except the outputs of adaptive pooling.
    Source: Ghiasi, Lin & Le, DropBlock: A regularization method for convolutional networks, NeurIPS 2018, algorithm 1 and equation 1.
    """

    block_size: int = 7

    usual = "the hidden values that are maps of a 2d convolution"
    raises_variance = True
    native_kinds = ("element", "channel")

    def check(self) -> None:
        self.require(0 <= self.weight < 1, "weight", "in [0, 1)")
        self.require(type(self.block_size) is int and self.block_size >= 1, "block_size", "a whole number, 1 or more")

    def defaults(self, sites: Sequence[Site]) -> list[Site]:
        return [site for site in super().defaults(sites) if site.is_map and site.spatial == 2 and "adaptive" not in site.op.lower()]

    def why_not(self, site: Site) -> str:
        if site.channels in (None, 1):
            return ""
        return (
            f"the splice takes [batch, channels, height, width], and the channels of the convolution are axis {site.channels} here. "
            "Select a value where they are axis 1, or use BernoulliDropout."
        )

    def unfit(self, shape: Sequence[int]) -> str:
        if len(shape) != 4:
            return "the splice takes maps, [batch, channels, height, width]. Leave the site out, or use BernoulliDropout there."
        if min(shape[2:]) < self.block_size:
            return f"block_size={self.block_size} is larger than the map. Give block_size={min(shape[2:])} or less, or leave the site out."
        return ""

    def in_a_row(self, weights: Sequence[float]) -> str:
        return f"{math.prod(1 - p for p in weights):.3g} of it is kept, not {1 - max(weights):.3g}"

    def __call__(self, z: Tensor, weight: Tensor, noise: Noise) -> Tensor:
        size, (height, width) = self.block_size, z.shape[2:]
        corners = z[:, :, : height - size + 1, : width - size + 1]  # the elements that may be corners
        gamma = weight * (height * width) / (size**2 * (height - size + 1) * (width - size + 1))  # equation 1
        begins = 1 - noise.keep(corners, gamma).to(z.dtype)
        # An element is dropped if a block begins at it, or less than ``size`` above or left of it.
        dropped = F.max_pool2d(F.pad(begins, [size - 1] * 4), size, stride=1)
        mask = 1 - dropped
        # If all elements are dropped, the least mean keeps 0 / 0 away.
        return z * mask / mask.to(weight.dtype).mean().clamp(min=1 / mask.numel())
