"""Sparse activations: Glorot, Bordes & Bengio, AISTATS 2011, section 3.2 (an L1 penalty on activation values)."""

from torch import Tensor

from graphreg import Penalty


class HiddenL1(Penalty, keys=("hidden_l1", "hidden_sparsity")):
    """The mean absolute value of activations, averaged over sites: ``mean |z|``.

    z: [any shape], floating -> 0-d, averaged over all its elements. ``weight`` >= 0.
    """

    def __call__(self, z: Tensor) -> Tensor:
        return z.abs().mean()
