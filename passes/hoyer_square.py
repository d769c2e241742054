"""The Hoyer-Square penalty."""

import torch
from torch import Tensor

from graphreg import Penalty


class HoyerSquare(Penalty, keys=("hoyer_square",)):
    """Penalizes examples whose activations are not sparse, whatever the scale of the activations.

    Formula: ``(sum |z|)² / sum z²``, the squared ratio of the L1 norm to the L2 norm of one example. The result is 1 if only one
    element is not 0, and at most the number of elements. For an example of zeros, the result and its gradient are 0.
    Shapes: z [examples, any shape] -> 0-d. A value of one dim is one example.

    Args:
        weight: The strength, 0 or more.

    Averaged over: the examples, then the sites.
    Default sites: the hidden values, except the outputs of normalizations.
    Source: Yang, Wen & Li, DeepHoyer, ICLR 2020, section 4.1. The paper applies the formula to weights; here it is applied to activations.
    """

    def __call__(self, z: Tensor) -> Tensor:
        examples = z.flatten(1) if z.dim() > 1 else z.reshape(1, -1)
        # For an example of zeros, 0 / 0 would be nan.
        squares = examples.square().sum(1).clamp(min=torch.finfo(z.dtype).tiny)
        return (examples.abs().sum(1).square() / squares).mean()
