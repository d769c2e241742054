"""Gaussian dropout: multiplicative Gaussian noise."""

from collections.abc import Sequence

from torch import Tensor

from graphreg import Noise, Splice


class GaussianDropout(Splice, keys=("gaussian_dropout",)):
    """Multiplies elements by normal noise that has the mean and the variance of dropout.

    Formula: ``z (1 + sqrt(p / (1 - p)) e)``, where p is ``weight`` and e is standard normal. The factor of z has mean 1 and variance
    ``p / (1 - p)``, as the factor ``m / (1 - p)`` of dropout has.
    Shapes: z [any shape], floating -> [same shape].

    Args:
        weight: The rate p of the dropout with the same mean and variance, 0 <= weight < 1.
        share_axes: The axes along which all elements share one e: ``"time"``, ``"batch"``, the number of an axis, or several of these.

    Draws: one e for each element.
    Default sites: the hidden values.
    Source: Srivastava et al., Dropout: A simple way to prevent neural networks from overfitting, JMLR 15 (2014), section 10.
    """

    share_axes: str | int | Sequence[str | int] = ()

    raises_variance = True
    separable = "elements"

    def check(self) -> None:
        self.require(0 <= self.weight < 1, "weight", "in [0, 1)")

    def __call__(self, z: Tensor, weight: Tensor, noise: Noise) -> Tensor:
        return z * (1 + (weight / (1 - weight)).sqrt() * noise.normal(z))
