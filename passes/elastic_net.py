"""The elastic net: Zou & Hastie, J. R. Stat. Soc. B 67 (2005), equation 3, as Friedman, Hastie & Tibshirani 2010, equation 2, write it."""

from torch import Tensor

from graphreg import Penalty


class ElasticNet(Penalty, keys=("elastic_net",), on="parameters"):
    """The mean of ``r |w| + (1 - r) w² / 2``, averaged over the selected parameters, by default all of 2 dims or more.

    w: [2 or more dims] -> 0-d. ``weight`` >= 0.

    Attributes:
        l1_ratio: r, in [0, 1]: 1 is the lasso, 0 is ridge regression.
        reduction: ``"mean"``, or ``"sum"``: the sum over all elements of all parameters.
    """

    l1_ratio: float = 0.5
    reduction: str = "mean"

    def check(self) -> None:
        super().check()
        self.require_number("l1_ratio", lambda ratio: 0 <= ratio <= 1, "in [0, 1]")

    def __call__(self, w: Tensor) -> Tensor:
        net = self.l1_ratio * w.abs() + (1 - self.l1_ratio) * w.square() / 2
        return net.sum() if self.reduction == "sum" else net.mean()
