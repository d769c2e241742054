"""Sparse weights: Tibshirani, Regression shrinkage and selection via the lasso, 1996, equation 1, as a penalty."""

from torch import Tensor

from graphreg import Penalty


class WeightL1(Penalty, keys=("weight_l1", "weight_sparsity"), on="parameters"):
    """The mean absolute value of a parameter, averaged over the selected parameters, by default all of 2 dims or more.

    w: [2 or more dims] -> 0-d. ``weight`` >= 0. With ``reduction="sum"`` it is the sum of |w| instead.
    """

    reduction: str = "mean"

    def __call__(self, w: Tensor) -> Tensor:
        return w.abs().sum() if self.reduction == "sum" else w.abs().mean()
