"""Concrete dropout, whose rate is learned."""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from graphreg import Noise, Splice

TEMPERATURE = 0.1  # τ


class ConcreteDropout(Splice, keys=("concrete_dropout",)):
    """Drops elements with a rate that is learned, one for each site. The penalty keeps the rate away from 0.

    Formula: ``units (1 - d) / (1 - p)`` with ``d = sigmoid((log p - log(1 - p) + log u - log(1 - u)) / τ)``, where u is uniform in (0, 1)
    and τ = 0.1. So d is near 0 or 1, and gradients reach p.
    Penalty: ``K (p log p + (1 - p) log(1 - p))``, the negative entropy of the mask of one sample, times ``weight``. K is the number of
    units. It is negative.
    Learns: ``logit``, log p - log(1 - p), [1] at each site, which is a parameter of the rewritten module.
    Shapes: units [..., units], floating -> [same shape].

    Args:
        weight: The strength of the penalty, 0 or more. At 0 the dropout acts all the same.
        start: The rate p at the start, 0 < start < 1.
        reduction: ``"mean"`` leaves K out; ``"sum"`` is the paper's.
        axis: The axis of units. None means axis 1 for a value that has the axes of a convolution's output, else the last axis.

    Draws: one u for each element.
    Averaged over: the units, then the sites.
    Default sites: the hidden values. Their shapes must be known, so give ``example_inputs``.
    Source: Gal, Hron & Kendall, Concrete dropout, NeurIPS 2017, equations 3 to 5. The paper also has ``l² (1 - p) |W|² / 2`` with the
    weight W that reads the value; ``weight_l2`` penalizes ``|W|²``, without the factor 1 - p.
    """

    start: float = 0.1
    reduction: str = "mean"
    axis: int | None = None

    off_at_zero = False

    def check(self) -> None:
        super().check()
        self.require_number("start", lambda start: 0 < start < 1, "above 0 and below 1")

    def init_state(self, like: Tensor) -> dict[str, Tensor]:
        logit = nn.Parameter(like.new_full((1,), math.log(self.start / (1 - self.start))))
        return {"logit": logit, "units": torch.tensor(like.shape[-1])}

    def __call__(self, units: Tensor, noise: Noise, state: dict[str, Tensor]) -> Tensor:
        logit = state["logit"]
        dropped = torch.sigmoid((logit + torch.logit(noise.uniform(units))) / TEMPERATURE)
        return units * ((1 - dropped) / torch.sigmoid(-logit)).to(units.dtype)

    def penalty(self, state: dict[str, Tensor]) -> Tensor:
        """Return the negative entropy of the mask, of one unit or of all."""
        logit = state["logit"]
        p = torch.sigmoid(logit)
        negative_entropy = -(p * softplus(-logit) + (1 - p) * softplus(logit)).sum()
        return negative_entropy * state["units"] if self.reduction == "sum" else negative_entropy
