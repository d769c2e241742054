"""Zoneout, for recurrent cells."""

from collections.abc import Sequence

import torch
from torch import Tensor

from graphreg import Noise, Site, Splice

CELLS = ("RNNCell", "GRUCell", "LSTMCell")


class Zoneout(Splice, keys=("zoneout",)):
    """At each step, keeps random units of a recurrent cell's state at their previous values.

    Formula: ``m z + (1 - m) previous``, where ``previous`` is the state that the cell read, and m is 0 with probability ``weight``, else
    1. In eval mode, the expectation replaces z: ``(1 - weight) z + weight previous``.
    Shapes: z, a state that a recurrent cell returns, [any shape], floating -> [same shape].

    Args:
        weight: The probability that a unit keeps its value from before the step, 0 <= weight < 1.

    Draws: one m for each element.
    Default sites: the states of ``nn.RNNCell``, ``nn.GRUCell`` and ``nn.LSTMCell``. An ``nn.LSTMCell`` returns two states, h
    and c. If the model's LSTM cell has the path ``cell``, the selector ``"cell:c"`` selects c.
    Source: Krueger et al., Zoneout: Regularizing RNNs by randomly preserving hidden activations, ICLR 2017, section 3.
    """

    usual = "the states of nn.RNNCell, nn.GRUCell and nn.LSTMCell"
    separable = "elements"

    def check(self) -> None:
        self.require(0 <= self.weight < 1, "weight", "in [0, 1)")

    def defaults(self, sites: Sequence[Site]) -> list[Site]:
        return [site for site in sites if any(label.op in CELLS for label in site.labels)]

    def __call__(self, z: Tensor, weight: Tensor, noise: Noise, previous: Tensor) -> Tensor:
        return torch.where(noise.keep(z, weight) != 0, z, previous)

    def in_eval(self, z: Tensor, weight: Tensor, previous: Tensor) -> Tensor:
        """Return the expectation of what ``__call__`` returns. This expectation replaces z in eval mode."""
        return torch.lerp(z, previous, weight.to(z.dtype))
