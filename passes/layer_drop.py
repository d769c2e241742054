"""LayerDrop: Fan, Grave & Joulin, Reducing transformer depth on demand with structured dropout, ICLR 2020, section 3.2."""

from collections.abc import Sequence

import torch
from torch import Tensor

from graphreg import Noise, Site, Splice


class LayerDrop(Splice, keys=("layer_drop",)):
    """Skips a module for a whole batch, with probability ``weight``: the value that it got takes the place of its output.

    z: [any shape], floating, the output of a module -> [same shape]: z itself, or ``module_input``, which must have its shape. Nothing is
    scaled. ``weight`` is a probability, 0 <= weight < 1. A selector of modules is required. The module is computed all the same, and a
    skipped one gets gradients of 0, so that all ranks of DistributedDataParallel have gradients of all parameters.
    """

    usual = "none; it skips the modules that you name, as in layer_drop={'weight': 0.2, 'pattern': 'layers.*'}"

    def check(self) -> None:
        self.require(0 <= self.weight < 1, "weight", "in [0, 1)")

    def defaults(self, sites: Sequence[Site]) -> list[Site]:
        return []

    def __call__(self, z: Tensor, weight: Tensor, noise: Noise, module_input: Tensor) -> Tensor:
        kept = noise.keep(z, weight, shared=range(z.dim())) != 0
        return torch.where(kept, z, module_input.to(z.dtype))
