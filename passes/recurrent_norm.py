"""The norm stabilizer: Krueger & Memisevic, Regularizing RNNs by stabilizing activations, ICLR 2016, equation 1.

``norm="l2"`` is that equation. The default takes squared norms, as the formula in theanets' documentation does
(``theanets.regularizers.RecurrentNorm``); theanets' code forgot the outer square.
"""

import torch
from torch import Tensor

from graphreg import Penalty, mean_over_pairs


class RecurrentNorm(Penalty, keys=("recurrent_norm",)):
    """The mean square of the change of the squared norm from step to step: ``mean (|z_t|² - |z_t-1|²)²``.

    steps: [time, batch, units] -> 0-d, averaged over sites, and at each site over all pairs of neighbouring steps of all
    sequences together, so that a long sequence weighs more. A single step gives 0. ``weight`` >= 0. A selector is required.

    Attributes:
        norm: ``"squared"``, or ``"l2"``: ``mean (|z_t| - |z_t-1|)²``.
        time_axis: The axis of time, for a value that does not come from a recurrent layer.
        lengths: The name of the model's input that holds the lengths: whole numbers [batch], or a bool mask [batch, time] that is
            True where a step counts (torch's padding masks are the opposite). All other steps are ignored.

    Raises:
        RegularizerError: The value is not a sequence, or the lengths do not fit it.
    """

    norm: str = "squared"
    time_axis: int = 1
    lengths: str | None = None

    def check(self) -> None:
        super().check()
        self.require(self.norm in ("squared", "l2"), "norm", "'squared' or 'l2'")

    def __call__(self, steps: Tensor, lengths: Tensor | None) -> Tensor:
        # vector_norm has the gradient 0 at a zero state, where the square root of a sum has none
        norms = torch.linalg.vector_norm(steps, dim=-1) if self.norm == "l2" else steps.square().sum(-1)
        return mean_over_pairs(norms.diff(dim=0).square(), lengths)
