"""Weight noise of a fixed variance: Graves, Practical variational inference for neural networks, NIPS 2011."""

from torch import Tensor

from graphreg import Noise, Splice


class WeightNoise(Splice, keys=("weight_noise",), on="parameters"):
    """Adds independent normal noise of standard deviation ``weight`` to a weight wherever the forward reads it: ``w + ε``.

    w: [any shape], floating -> [same shape], by default each parameter of 2 dims or more. ``weight`` is in the units of w, weight >= 0.
    One draw serves all reads in a call. The parameter itself, its gradient's place and what penalties measure stay as they are.
    """

    def __call__(self, w: Tensor, weight: Tensor, noise: Noise) -> Tensor:
        return w + (weight * noise.normal(w)).to(w.dtype)
