"""Additive Gaussian noise: Bishop, Training with noise is equivalent to Tikhonov regularization, 1995, equation 2."""

from torch import Tensor

from graphreg import Noise, Splice


class GaussianNoise(Splice, keys=("noise",)):
    """Adds independent normal noise of standard deviation ``weight`` to each element.

    z: [any shape], floating -> [same shape]. ``weight`` is in the units of z, weight >= 0.
    """

    def __call__(self, z: Tensor, weight: Tensor, noise: Noise) -> Tensor:
        return z + weight * noise.normal(z)
