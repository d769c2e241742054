"""The norm stabilizer for sequences of states."""

import torch
from torch import Tensor

from graphreg import ModelInput, Penalty, mean_over_pairs


class RecurrentNorm(Penalty, keys=("recurrent_norm",)):
    """Penalizes changes of a state's norm from one step to the next.

    Formula: ``(|z_t|² - |z_t-1|²)²``, where |z| is the L2 norm; with ``norm="l2"``, ``(|z_t| - |z_t-1|)²``. A sequence of a single step
    gives 0.
    Shapes: steps [time, batch, units] -> 0-d.

    Args:
        weight: The strength, 0 or more.
        norm: ``"squared"`` for differences of squared norms, or ``"l2"`` for differences of norms.
        time_axis: The axis of time in a value. For the output of a recurrent layer, leave it out: ``batch_first`` of the layer determines
            the axis.
        lengths: The name of an input of the model. The input has the lengths of the sequences, whole numbers [batch], or is a mask
            [batch, time] that is 1 or True where a step counts (torch's padding masks are True where a step does not count). All other
            steps are left out, so the steps before and after a gap are neighbours. None means that every step counts.

    Raises:
        RegularizerError: A value is not a sequence, or the lengths do not fit the value.

    Averaged over: all pairs of neighbouring steps in all sequences of the batch, so a long sequence counts more; then the sites.
    Default sites: none. Give a selector of sequences.
    Source: Krueger & Memisevic, Regularizing RNNs by stabilizing activations, ICLR 2016, equation 1, for ``norm="l2"``. theanets'
    documentation (``theanets.regularizers.RecurrentNorm``) has the formula with squared norms; theanets' code lacks the outer square.
    """

    norm: str = "squared"
    time_axis: int = 1
    lengths: ModelInput = None

    def check(self) -> None:
        super().check()
        self.require(self.norm in ("squared", "l2"), "norm", "'squared' or 'l2'")

    def __call__(self, steps: Tensor, lengths: Tensor | None) -> Tensor:
        # At a state of zeros, the gradient of vector_norm is 0; the gradient of ``steps.square().sum(-1).sqrt()`` would be nan.
        norms = torch.linalg.vector_norm(steps, dim=-1) if self.norm == "l2" else steps.square().sum(-1)
        return mean_over_pairs(norms.diff(dim=0).square(), lengths)
