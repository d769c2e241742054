"""LayerDrop, which skips modules."""

from collections.abc import Sequence

import torch
from torch import Tensor

from graphreg import Noise, Site, Splice


class LayerDrop(Splice, keys=("layer_drop",)):
    """Skips a module for the whole batch at random: the module's input takes the place of its output.

    Formula: ``m z + (1 - m) x``, where x is the module's input, and m is 0 with probability ``weight``, else 1. Nothing is scaled.
    A skipped module still runs, so that its parameters have gradients (of 0): DistributedDataParallel needs a gradient of each parameter on
    each rank.
    Shapes: z and x [any shape, the same for both], floating -> [same shape].

    Args:
        weight: The probability that a module is skipped, 0 <= weight < 1.

    Draws: one m for each site in each call.
    Default sites: none. Give a selector of modules.
    Source: Fan, Grave & Joulin, Reducing transformer depth on demand with structured dropout, ICLR 2020, section 3.2.
    """

    usual = "none: select the modules to skip, as in layer_drop={'weight': 0.2, 'pattern': 'layers.*'}"
    separable = "elements"

    def check(self) -> None:
        self.require(0 <= self.weight < 1, "weight", "in [0, 1)")

    def defaults(self, sites: Sequence[Site]) -> list[Site]:
        return []

    def __call__(self, z: Tensor, weight: Tensor, noise: Noise, module_input: Tensor) -> Tensor:
        kept = noise.keep(z, weight, shared=range(z.dim())) != 0
        # Chosen, not multiplied by 0: an infinity in the part that is left out would become nan.
        return torch.where(kept, z, module_input.to(z.dtype))
