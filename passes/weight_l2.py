"""Weight decay, as a penalty."""

import math
from collections.abc import Sequence

from torch import Tensor

from graphreg import Penalty, Site


class WeightL2(Penalty, keys=("weight_l2", "weight_decay"), on="parameters"):
    """Penalizes weights by their squares, so that they stay small.

    Formula: ``w²``.
    Shapes: w [2 or more dims] -> 0-d.

    Args:
        weight: The strength, 0 or more. The mean divides by the number of elements. So at the same strength, the gradient of the mean is
            far smaller than the gradient of the sum. ``graphreg.report`` prints the ``weight_decay`` of SGD that has the same effect.
        reduction: ``"mean"``, or ``"sum"`` for the sum over all elements of all parameters.

    As the keyword ``weight_decay`` it is theanets' regularizer of that name, not the option of an optimizer. The plan, the report and the
    log say by how much it is weaker, and how to write the same as SGD's.

    Averaged over: the elements of each parameter, then the parameters.
    Default sites: the parameters of 2 dims or more, without biases and norms.
    Source: Krogh & Hertz, A simple weight decay can improve generalization, NIPS 4 (1991), equation 4. theanets' code takes the mean, as
    this class does by default.
    """

    reduction: str = "mean"

    def __call__(self, w: Tensor) -> Tensor:
        return w.square().sum() if self.reduction == "sum" else w.square().mean()

    def slope(self, elements: int) -> float:
        """Return the derivative of the formula at a weight of 1."""
        return 2.0 if self.reduction == "sum" else 2 / elements

    def caution(self, sites: Sequence[Site], of: int) -> str:
        """Warn of the keyword ``weight_decay`` without ``reduction="sum"``: how much weaker it is than an optimizer's, and the cure."""
        is_keyword = self.name is not None and self.name.startswith("weight_decay")
        if not is_keyword or self.reduction == "sum" or (type(self.weight) is float and not self.weight):
            return ""
        weaker = [1 / (self.slope(math.prod(site.shape or ())) / of) for site in sites]
        low, high = f"{min(weaker):.2g}", f"{max(weaker):.2g}"
        half = f"{self.weight / 2:g}" if type(self.weight) is float else "half of it"
        return (
            f"a mean, as in theanets: it pulls {low}{f' to {high}' * (low != high)} times more weakly than the weight_decay of an "
            f"optimizer. As SGD's: weight_decay={{'weight': {half}, 'reduction': 'sum'}}. AdamW's is an option of AdamW, for which "
            "graphreg.param_groups makes the groups"
        )

    def note(self, sites: Sequence[Site], weight: float) -> str:
        """Return a line with the ``weight_decay`` of SGD that has the same effect: the gradient of the penalty, divided by w."""
        # The mean over the parameters divides by their number, too.
        count = 1 if self.reduction == "sum" else len(sites)
        decays = [weight * self.slope(math.prod(site.shape or ())) / count for site in sites]
        low, high = f"{min(decays):.3g}", f"{max(decays):.3g}"
        return f"equivalent SGD weight_decay: {low}" + f" to {high}, by parameter" * (low != high)
