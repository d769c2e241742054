"""Multiplicative Gaussian noise: Srivastava et al., JMLR 15 (2014), section 10, with the mean and variance of dropout."""

from collections.abc import Sequence

from torch import Tensor

from graphreg import Noise, Splice


class GaussianDropout(Splice, keys=("gaussian_dropout",)):
    """Multiplies each element by normal noise of mean 1 and variance ``p / (1 - p)``, those of dropout with rate p, the ``weight``.

    z: [any shape], floating -> [same shape]. ``weight`` is a rate, 0 <= weight < 1.

    Attributes:
        share_axes: Axes along which all elements get the same factor: ``"time"``, ``"batch"``, the number of an axis, or several of these.
    """

    share_axes: str | int | Sequence[str | int] = ()

    def check(self) -> None:
        self.require(0 <= self.weight < 1, "weight", "in [0, 1)")

    def __call__(self, z: Tensor, weight: Tensor, noise: Noise) -> Tensor:
        return z * (1 + (weight / (1 - weight)).sqrt() * noise.normal(z))
