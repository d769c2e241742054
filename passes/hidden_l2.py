"""An L2 penalty on activations."""

from torch import Tensor

from graphreg import Penalty


class HiddenL2(Penalty, keys=("hidden_l2",)):
    """Penalizes activations by their squares, so that they stay small.

    Formula: ``z²``.
    Shapes: z [any shape], floating -> 0-d.

    Args:
        weight: The strength, 0 or more.

    Averaged over: the elements of each value, then the sites.
    Default sites: the hidden values, except the outputs of normalizations.
    Source: Merity, McCann & Socher, Revisiting activation regularization for language RNNs, 2017 (activation regularization, AR). The paper
    writes a norm. The code of the same authors (AWD-LSTM) computes the mean of the squares, as this class does.
    """

    def __call__(self, z: Tensor) -> Tensor:
        return z.square().mean()

    def slope(self, elements: int) -> float:
        """Return the derivative of the formula at an activation of 1."""
        return 2 / elements
