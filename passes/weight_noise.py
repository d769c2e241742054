"""Weight noise of a fixed variance."""

from torch import Tensor

from graphreg import Noise, Splice


class WeightNoise(Splice, keys=("weight_noise",), on="parameters"):
    """Adds normal noise to a parameter wherever the forward reads it.

    Formula: ``w + weight e``, where e is standard normal. The noise is not written into the parameter: the parameter receives the
    gradient, and penalties measure the parameter without the noise.
    Shapes: w [any shape], floating -> [same shape].

    Args:
        weight: The standard deviation of the noise, in the units of w, 0 or more.

    Draws: one e for each element in each call. All reads of the parameter share the draw.
    Default sites: the parameters of 2 dims or more that the forward reads, without biases and norms.
    Source: Graves, Practical variational inference for neural networks, NIPS 2011.
    """

    def __call__(self, w: Tensor, weight: Tensor, noise: Noise) -> Tensor:
        return w + (weight * noise.normal(w)).to(w.dtype)
