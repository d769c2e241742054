"""L0 regularization: gates that learn which units to keep."""

import math

import torch
from torch import Tensor, nn

from graphreg import Noise, Splice

TEMPERATURE, LOW, HIGH = 2 / 3, -0.1, 1.1  # beta, gamma and zeta of the paper


class L0Gates(Splice, keys=("l0_gates",)):
    """Multiplies each unit by a gate that learns whether the unit is needed; penalizes the number of gates that are not 0.

    Formula: ``units min(1, max(0, 1.2 s - 0.1))``, with ``s = sigmoid((log u - log(1 - u) + log_alpha) 3/2)``, where u is uniform in
    (0, 1). In eval mode, s is ``sigmoid(log_alpha)``. Many gates are 0 or 1 exactly.
    Penalty: ``sigmoid(log_alpha + 2/3 log 11)`` times ``weight``. The sigmoid is the probability that a gate is not 0.
    Learns: ``log_alpha``, a tensor of shape [units] for each site. It is a parameter of the rewritten module.
    Shapes: units [..., units], floating -> [same shape].

    Args:
        weight: The strength of the penalty, 0 or more. With strength 0, the gates still act.
        start: ``sigmoid(log_alpha)`` before training, 0 < start < 1. With a start near 1, most gates are open.
        reduction: ``"mean"``, or ``"sum"`` for the expected number of gates that are not 0, as in the paper.
        axis: The axis of units. None means that of a convolution's channels, else the last.

    Draws: one u for each unit, in each call.
    Averaged over: the units, then the sites. Only the penalty is averaged.
    Default sites: the hidden values. Their shapes must be known, so give ``example_inputs``.
    Source: Louizos, Welling & Kingma, Learning sparse neural networks through L0 regularization, ICLR 2018, equations 10 to 13, with
    the constants of section 4: beta = 2/3, gamma = -0.1 and zeta = 1.1. The paper draws the initial log_alpha
    near the logit of ``start``. Here, each log_alpha begins with this logit.
    """

    start: float = 0.5
    reduction: str = "mean"
    axis: int | None = None

    off_at_zero = False

    def check(self) -> None:
        super().check()
        self.require_number("start", lambda start: 0 < start < 1, "above 0 and below 1")

    def init_state(self, like: Tensor) -> dict[str, Tensor]:
        return {"log_alpha": nn.Parameter(like.new_full((like.shape[-1],), math.log(self.start / (1 - self.start))))}

    def __call__(self, units: Tensor, noise: Noise, state: dict[str, Tensor]) -> Tensor:
        u = noise.uniform(units, shared=range(units.dim() - 1))
        return units * _gate(torch.sigmoid((torch.logit(u) + state["log_alpha"]) / TEMPERATURE)).to(units.dtype)

    def in_eval(self, units: Tensor, state: dict[str, Tensor]) -> Tensor:
        """Multiply the units by the gates of eval mode, which do not depend on u."""
        return units * _gate(torch.sigmoid(state["log_alpha"])).to(units.dtype)

    def penalty(self, state: dict[str, Tensor]) -> Tensor:
        """Return the mean or the sum of the probabilities that the gates are not 0."""
        is_open = torch.sigmoid(state["log_alpha"] - TEMPERATURE * math.log(-LOW / HIGH))
        return is_open.sum() if self.reduction == "sum" else is_open.mean()


def _gate(s: Tensor) -> Tensor:
    return (s * (HIGH - LOW) + LOW).clamp(0, 1)
