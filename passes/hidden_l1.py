"""An L1 penalty on activations."""

from torch import Tensor

from graphreg import ModelInput, Penalty, mean_over_counted


class HiddenL1(Penalty, keys=("hidden_l1", "hidden_sparsity")):
    """Penalizes activations by their absolute values, so that they become sparse.

    Formula: ``|z|``.
    Shapes: z [any shape], floating -> 0-d.

    Args:
        weight: The strength, 0 or more.
        lengths: The name of an input of the model that says which steps count: lengths [batch], or a mask [batch, time]. A value is then
            [batch, time, ...], and steps that do not count, which are padding, are neither penalized nor averaged.
        time_axis: The axis of time in a value, for ``lengths``. A recurrent layer says itself which axis that is.

    Averaged over: the elements of each value, then the sites.
    Default sites: the hidden values, except the outputs of normalizations.
    Source: Glorot, Bordes & Bengio, Deep sparse rectifier neural networks, AISTATS 2011, section 3.2.
    """

    lengths: ModelInput = None
    time_axis: int = 1

    def __call__(self, z: Tensor, counted: Tensor | None = None) -> Tensor:
        return mean_over_counted(z.abs(), counted)

    def slope(self, elements: int) -> float:
        """Return the derivative of the formula at an activation of 1."""
        return 1 / elements
