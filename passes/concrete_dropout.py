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
    Penalty: ``K (p log p + (1 - p) log(1 - p))`` times ``weight``, where K is the number of units. This is the negative entropy of the mask
    of one sample, so the penalty is negative.
    Learns: ``logit`` = log p - log(1 - p), a tensor of shape [1] for each site. It is a parameter of the rewritten module.
    Shapes: units [..., units], floating -> [same shape].

    Args:
        weight: The strength of the penalty, 0 or more. With strength 0, the dropout still acts.
        start: The rate p before training, 0 < start < 1.
        reduction: ``"mean"`` leaves the factor K out of the penalty, and averages over the sites. ``"sum"`` keeps the factor, as the paper
            does, and adds over the sites.
        axis: The axis of units. None means that of a convolution's channels, else the last.

    Draws: one u for each element.
    Averaged over: the units, then the sites. Only the penalty is averaged.
    Default sites: the hidden values. Their shapes must be known, so give ``example_inputs``.
    Source: Gal, Hron & Kendall, Concrete dropout, NeurIPS 2017, equations 3 to 5. The paper adds a second penalty on W, the
    weight of the layer that reads the value: ``l² (1 - p) |W|² / 2``, where l is the length scale of the prior. The paper's dropout does
    not divide by 1 - p; for dropout that does, as here, the second penalty is ``l² |W|² / (2 (1 - p))``, as in the authors' code. This
    class does not have the second penalty; ``weight_l2`` penalizes ``|W|²``, without a factor that depends on p.
    """

    start: float = 0.1
    reduction: str = "mean"
    axis: int | None = None

    off_at_zero = False
    raises_variance = True

    def check(self) -> None:
        super().check()
        self.require_number("start", lambda start: 0 < start < 1, "above 0 and below 1")

    def init_state(self, like: Tensor) -> dict[str, Tensor]:
        logit = nn.Parameter(like.new_full((1,), math.log(self.start / (1 - self.start))))
        # The method ``penalty`` gets no value, so the state holds the number of units.
        return {"logit": logit, "units": torch.tensor(like.shape[-1], device=like.device)}

    def __call__(self, units: Tensor, noise: Noise, state: dict[str, Tensor]) -> Tensor:
        logit = state["logit"]
        dropped = torch.sigmoid((logit + torch.logit(noise.uniform(units))) / TEMPERATURE)
        # sigmoid(-logit) is 1 - p, without the rounding of a difference.
        return units * ((1 - dropped) / torch.sigmoid(-logit)).to(units.dtype)

    def penalty(self, state: dict[str, Tensor]) -> Tensor:
        """Return the negative entropy of the mask: for one unit, or with ``reduction="sum"`` for all units of a sample."""
        logit = state["logit"]
        p = torch.sigmoid(logit)
        # softplus(-logit) is -log p, and stays finite where p rounds to 0.
        negative_entropy = -(p * softplus(-logit) + (1 - p) * softplus(logit)).sum()
        return negative_entropy * state["units"] if self.reduction == "sum" else negative_entropy
