"""DropConnect: Wan et al., Regularization of neural networks using DropConnect, ICML 2013, equation 2; on the hidden-to-hidden weights
of an LSTM it is the weight drop of Merity, Keskar & Socher, Regularizing and optimizing LSTM language models, ICLR 2018, section 2."""

from torch import Tensor

from graphreg import Noise, Splice


class DropConnect(Splice, keys=("drop_connect", "weight_dropout"), on="parameters"):
    """Zeroes each element of a weight with probability ``weight`` wherever the forward reads it; scales the rest by ``1 / (1 - weight)``.

    w: [any shape], floating -> [same shape], by default each parameter of 2 dims or more. ``weight`` is a probability, 0 <= weight < 1.
    One mask serves all reads in a call, all examples and all steps of a sequence. As in Merity et al., weights are scaled in train mode
    and whole in eval mode, where Wan et al. sample the activations.
    """

    def check(self) -> None:
        self.require(0 <= self.weight < 1, "weight", "in [0, 1)")

    def __call__(self, w: Tensor, weight: Tensor, noise: Noise) -> Tensor:
        return w * noise.keep(w, weight) * (1 / (1 - weight)).to(w.dtype)
