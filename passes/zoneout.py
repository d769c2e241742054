"""Zoneout: Krueger et al., Zoneout: Regularizing RNNs by randomly preserving hidden activations, ICLR 2017, section 3."""

from collections.abc import Sequence

import torch
from torch import Tensor

from graphreg import Noise, Site, Splice

CELLS = ("RNNCell", "GRUCell", "LSTMCell")


class Zoneout(Splice, keys=("zoneout",)):
    """Keeps units of a cell's state as they were before the step, each with probability ``weight``; in eval mode it is the expectation.

    z: [any shape], floating, a state that a recurrent cell returns -> [same shape]. In train mode each unit of the result is that of
    ``previous``, the state that the cell got, with probability ``weight``, else that of z. In eval mode the result is
    ``weight * previous + (1 - weight) * z``. ``weight`` is a probability, 0 <= weight < 1. By default it acts on the states of
    ``nn.RNNCell``, ``nn.GRUCell`` and ``nn.LSTMCell``, of the last on h and c: ``"cell*:c"`` selects one of them.
    """

    usual = "the states of nn.RNNCell, nn.GRUCell and nn.LSTMCell"

    def check(self) -> None:
        self.require(0 <= self.weight < 1, "weight", "in [0, 1)")

    def defaults(self, sites: Sequence[Site]) -> list[Site]:
        return [site for site in sites if any(label.op in CELLS for label in site.labels)]

    def __call__(self, z: Tensor, weight: Tensor, noise: Noise, previous: Tensor) -> Tensor:
        return torch.where(noise.keep(z, weight) != 0, z, previous)

    def in_eval(self, z: Tensor, weight: Tensor, previous: Tensor) -> Tensor:
        """Return the expectation, for eval mode."""
        return torch.lerp(z, previous, weight.to(z.dtype))
