"""Small activations: the activation regularization (AR) of Merity, McCann & Socher, Revisiting activation regularization for language
RNNs, 2017. The paper writes a norm; the mean of squares is what the authors' code of AWD-LSTM computes."""

from torch import Tensor

from graphreg import Penalty


class HiddenL2(Penalty, keys=("hidden_l2",)):
    """The mean square of activations, averaged over sites: ``mean z²``.

    z: [any shape], floating -> 0-d, averaged over all its elements. ``weight`` >= 0.
    """

    def __call__(self, z: Tensor) -> Tensor:
        return z.square().mean()
