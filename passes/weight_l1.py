"""The lasso, as a penalty on weights."""

from torch import Tensor

from graphreg import Penalty


class WeightL1(Penalty, keys=("weight_l1", "weight_sparsity"), on="parameters"):
    """Penalizes weights by their absolute values, so that they become sparse.

    Formula: ``|w|``.
    Shapes: w [2 or more dims] -> 0-d.

    Args:
        weight: The strength, 0 or more.
        reduction: ``"mean"``, or ``"sum"`` for the sum over all elements of all parameters.
        by: ``"gradient"``, or ``"prox"`` for exact zeros: ``graphreg.prox_`` then moves each weight towards 0, and no further.

    Averaged over: the elements of each parameter, then the parameters.
    Default sites: the parameters of 2 dims or more, without biases and norms.
    Source: Tibshirani, Regression shrinkage and selection via the lasso, J. R. Stat. Soc. B 58 (1996), equation 1. The paper has a
    constraint in place of the penalty. The proximal map is soft thresholding: Parikh & Boyd, Proximal algorithms, Foundations and Trends
    in Optimization 1 (2014), section 6.5.
    """

    reduction: str = "mean"
    by: str = "gradient"

    def __call__(self, w: Tensor) -> Tensor:
        return w.abs().sum() if self.reduction == "sum" else w.abs().mean()

    def prox(self, w: Tensor, step: Tensor) -> Tensor:
        """Move each weight towards 0, and no further."""
        return w.sign() * (w.abs() - step * self.slope(w.numel())).relu()

    def slope(self, elements: int) -> float:
        """Return the derivative of the formula at a weight of 1."""
        return 1.0 if self.reduction == "sum" else 1 / elements
