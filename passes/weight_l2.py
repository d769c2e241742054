"""Weight decay as a penalty: Krogh & Hertz, NIPS 4 (1991), equation 4; averaged, as theanets' code does."""

import math
from collections.abc import Sequence

from torch import Tensor

from graphreg import Penalty, Site


class WeightL2(Penalty, keys=("weight_l2", "weight_decay"), on="parameters"):
    """The mean square of a parameter, averaged over the selected parameters, by default all of 2 dims or more.

    w: [2 or more dims] -> 0-d. ``weight`` >= 0. With ``reduction="sum"`` it is the sum of w² instead. A mean divides
    by the number of elements, so it pulls far less at the same ``weight``. The report prints the SGD weight decay of the same effect.
    """

    reduction: str = "mean"

    def __call__(self, w: Tensor) -> Tensor:
        return w.square().sum() if self.reduction == "sum" else w.square().mean()

    def note(self, sites: Sequence[Site], weight: float) -> str:
        """Return a line with the SGD ``weight_decay`` of the same effect: the gradient of the penalty divided by w."""
        if self.reduction == "sum":
            return f"equivalent SGD weight_decay: {2 * weight:.3g}"
        decays = [2 * weight / (len(sites) * math.prod(site.shape or ())) for site in sites]
        low, high = f"{min(decays):.3g}", f"{max(decays):.3g}"
        return f"equivalent SGD weight_decay: {low}" + f" to {high}, by parameter" * (low != high)
