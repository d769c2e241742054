"""Sparse units: Ng, Sparse autoencoder, CS294A lecture notes, 2011, section 3."""

import torch
from torch import Tensor

from graphreg import Penalty


class KLSparsity(Penalty, keys=("kl_sparsity",)):
    """The divergence of each unit's mean activation from a small target, summed over units: ``sum KL(target || mean z)``.

    units: [samples, units], in [0, 1] as a sigmoid gives them -> 0-d, averaged over sites. KL is that of two Bernoulli distributions,
    ``t log(t / m) + (1 - t) log((1 - t) / (1 - m))``. A unit whose mean is 0 or 1 in floating point counts as if it were the nearest
    number that has a logarithm. ``weight`` >= 0.

    Attributes:
        target: The wanted mean activation of each unit, in (0, 1).
        axis: The axis of units; None for axis 1 of a convolution's value, else the last. All other axes are samples.

    Raises:
        RegularizerError: A value is outside of [0, 1].
    """

    target: float = 0.05
    axis: int | None = None

    value_range = (0, 1)

    def check(self) -> None:
        super().check()
        self.require_number("target", lambda target: 0 < target < 1, "between 0 and 1, without these")

    def __call__(self, units: Tensor) -> Tensor:
        least = torch.finfo(units.dtype).eps
        mean, t = units.mean(0).clamp(least, 1 - least), self.target
        return (t * (t / mean).log() + (1 - t) * ((1 - t) / (1 - mean)).log()).sum()
