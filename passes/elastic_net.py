"""The elastic net."""

from torch import Tensor

from graphreg import Penalty


class ElasticNet(Penalty, keys=("elastic_net",), on="parameters"):
    """Penalizes large weights by a mixture of their absolute values and their squares.

    Formula: ``r |w| + (1 - r) w² / 2``, where r is ``l1_ratio``.
    Shapes: w [2 or more dims] -> 0-d.

    Args:
        weight: The strength, 0 or more.
        l1_ratio: r, in [0, 1]: 1 is the lasso, 0 is ridge regression.
        reduction: ``"mean"``, or ``"sum"`` for the sum over all elements of all parameters.
        by: ``"gradient"``, or ``"prox"`` for exact zeros by ``graphreg.prox_``.

    Averaged over: the elements of each parameter, then the parameters.
    Default sites: the parameters of 2 dims or more, without biases and norms.
    Source: Zou & Hastie, Regularization and variable selection via the elastic net, J. R. Stat. Soc. B 67 (2005), equation 3, in the form
    of Friedman, Hastie & Tibshirani 2010, equation 2. The proximal map: Parikh & Boyd, Proximal algorithms, Foundations and Trends in
    Optimization 1 (2014), section 6.5.
    """

    l1_ratio: float = 0.5
    reduction: str = "mean"
    by: str = "gradient"

    def check(self) -> None:
        super().check()
        self.require_number("l1_ratio", lambda ratio: 0 <= ratio <= 1, "in [0, 1]")

    def __call__(self, w: Tensor) -> Tensor:
        net = self.l1_ratio * w.abs() + (1 - self.l1_ratio) * w.square() / 2
        return net.sum() if self.reduction == "sum" else net.mean()

    def prox(self, w: Tensor, step: Tensor) -> Tensor:
        """Move each weight towards 0, and no further, and scale the rest down."""
        step = step * self.slope(w.numel())
        return w.sign() * (w.abs() - step * self.l1_ratio).relu() / (1 + step * (1 - self.l1_ratio))

    def slope(self, elements: int) -> float:
        """Return the derivative of the formula at a weight of 1, which does not depend on ``l1_ratio``."""
        return 1.0 if self.reduction == "sum" else 1 / elements
