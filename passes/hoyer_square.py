"""Sparse examples, whatever their scale: the Hoyer-Square of Yang, Wen & Li, DeepHoyer, ICLR 2020, section 4.1.

The paper takes it of weights; here it is taken of the activations of each example.
"""

import torch
from torch import Tensor

from graphreg import Penalty


class HoyerSquare(Penalty, keys=("hoyer_square",)):
    """The squared ratio of the L1 norm to the L2 norm of each example, averaged over examples: ``mean (sum |z|)² / sum z²``.

    z: [examples, any shape] -> 0-d, averaged over sites. The ratio is between 1, for a single element other than 0, and the number
    of elements. It is 0 for an example of zeros, with the gradient 0. A value of one dim is one example. ``weight`` >= 0.
    """

    def __call__(self, z: Tensor) -> Tensor:
        examples = z.flatten(1) if z.dim() > 1 else z.reshape(1, -1)
        squares = examples.square().sum(1).clamp(min=torch.finfo(z.dtype).tiny)
        return (examples.abs().sum(1).square() / squares).mean()
