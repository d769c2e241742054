"""DropConnect, also known as weight drop."""

from torch import Tensor

from graphreg import Noise, Splice


class DropConnect(Splice, keys=("drop_connect", "weight_dropout"), on="parameters"):
    """Zeroes elements of a parameter at random wherever the forward reads it, and scales the others so that the expectation is preserved.

    Formula: ``w m / (1 - weight)``, where m is 0 with probability ``weight``, else 1.
    Shapes: w [any shape], floating -> [same shape].

    Args:
        weight: The probability that an element is zeroed, 0 <= weight < 1.

    Draws: one m for each element in each call. All reads of the parameter, all examples and all steps of a sequence share the draw.
    Default sites: the parameters of 2 dims or more that the forward reads, without biases and norms.
    Source: Wan, Zeiler, Zhang, LeCun & Fergus, Regularization of neural networks using DropConnect, ICML 2013, equation 2. Merity, Keskar &
    Socher, Regularizing and optimizing LSTM language models, ICLR 2018, section 2, zero the hidden-to-hidden weights of an LSTM in this way
    (weight drop). In eval mode, this class leaves the weights unchanged, as Merity et al. do; Wan et al. sample the activations.
    """

    def check(self) -> None:
        self.require(0 <= self.weight < 1, "weight", "in [0, 1)")

    def __call__(self, w: Tensor, weight: Tensor, noise: Noise) -> Tensor:
        return w * noise.keep(w, weight) * (1 / (1 - weight)).to(w.dtype)
