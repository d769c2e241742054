"""DropBlock: Ghiasi, Lin & Le, DropBlock: A regularization method for convolutional networks, NeurIPS 2018, algorithm 1 and equation 1."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from graphreg import Noise, Site, Splice


class DropBlock(Splice, keys=("drop_block",)):
    """Zeroes square blocks of each channel, about a share ``weight`` of all elements; divides the rest by the share that is kept.

    z: [batch, channels, height, width], floating -> [same shape]. Blocks lie within the map and may overlap, and each channel of each
    example has its own. The share that is kept is counted over the whole value, as in the paper. ``weight`` is a rate, 0 <= weight < 1. By
    default it acts on the hidden values that are maps: those with the axes of a 2d convolution's output, without global pooling.

    Attributes:
        block_size: Height and width of a block, at most those of the map. 1 gives dropout of single elements.
    """

    block_size: int = 7

    usual = "the hidden values that are maps of a 2d convolution"

    def check(self) -> None:
        self.require(0 <= self.weight < 1, "weight", "in [0, 1)")
        self.require(type(self.block_size) is int and self.block_size >= 1, "block_size", "a whole number, 1 or more")

    def defaults(self, sites: Sequence[Site]) -> list[Site]:
        return [site for site in super().defaults(sites) if site.spatial == 2 and "adaptive" not in site.op.lower()]

    def unfit(self, shape: Sequence[int]) -> str:
        if len(shape) != 4:
            return "it takes maps, [batch, channels, height, width]. Leave the site out, or use BernoulliDropout there."
        if min(shape[2:]) < self.block_size:
            return f"block_size={self.block_size} is larger than the map. Give block_size={min(shape[2:])} or less, or leave the site out."
        return ""

    def __call__(self, z: Tensor, weight: Tensor, noise: Noise) -> Tensor:
        size, (height, width) = self.block_size, z.shape[2:]
        corners = z[:, :, : height - size + 1, : width - size + 1]  # where a block may begin
        gamma = weight * (height * width) / (size**2 * (height - size + 1) * (width - size + 1))  # equation 1
        begins = 1 - noise.keep(corners, gamma).to(z.dtype)
        dropped = F.max_pool2d(F.pad(begins, [size - 1] * 4), size, stride=1)
        mask = 1 - dropped
        return z * mask / mask.to(weight.dtype).mean().clamp(min=1 / mask.numel())
