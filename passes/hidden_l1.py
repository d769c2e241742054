"""An L1 penalty on activations."""

from torch import Tensor

from graphreg import Penalty


class HiddenL1(Penalty, keys=("hidden_l1", "hidden_sparsity")):
    """Penalizes activations by their absolute values, so that they become sparse.

    Formula: ``|z|``.
    Shapes: z [any shape], floating -> 0-d.

    Args:
        weight: The strength, 0 or more.

    Averaged over: the elements of each value, then the sites.
    Default sites: the hidden values, except the outputs of normalizations.
    Source: Glorot, Bordes & Bengio, Deep sparse rectifier neural networks, AISTATS 2011, section 3.2.
    """

    def __call__(self, z: Tensor) -> Tensor:
        return z.abs().mean()

    def slope(self, elements: int) -> float:
        """Return the derivative of the formula at an activation of 1."""
        return 1 / elements
