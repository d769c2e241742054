"""The max-norm constraint, as a penalty."""

import torch
from torch import Tensor

from graphreg import Penalty, required


class MaxNorm(Penalty, keys=("max_norm",), on="parameters"):
    """Penalizes rows of a weight whose norm is above a limit.

    Formula: ``sum max(0, |row| - limit)²`` over the rows, where |row| is the L2 norm. A row holds the weights of one output unit or
    channel, or one entry of an embedding.
    Shapes: w [rows, ...] -> 0-d.

    Args:
        weight: The strength, 0 or more.
        limit: A number above 0. A row whose norm is at most this number adds nothing to the penalty. This option has no default.
        reduction: ``"mean"`` or ``"sum"``, over the parameters.
        by: ``"gradient"``, or ``"prox"`` for the constraint itself: after each step, ``graphreg.prox_`` scales rows with a norm above the
            limit down to the limit. The strength then decides only whether it does: any strength above 0 means the same.

    Averaged over: the parameters.
    Default sites: the parameters of 2 dims or more, without biases and norms.
    Source: Srivastava et al., Dropout: A simple way to prevent neural networks from overfitting, JMLR 15 (2014), section 5.1. The paper
    constrains the norms, as ``by="prox"`` does; otherwise this class penalizes them.
    """

    limit: float = required()
    reduction: str = "mean"
    by: str = "gradient"

    def check(self) -> None:
        super().check()
        self.require_number("limit", lambda limit: limit > 0, "above 0")

    def __call__(self, w: Tensor) -> Tensor:
        # At a row of zeros, the gradient of vector_norm is 0; that of a square root would be nan.
        norms: Tensor = torch.linalg.vector_norm(w.flatten(1), dim=1)
        return (norms - self.limit).relu().square().sum()

    def prox(self, w: Tensor, step: Tensor) -> Tensor:
        """Scale each row whose norm is above the limit down to the limit."""
        norms: Tensor = torch.linalg.vector_norm(w.flatten(1), dim=1)
        scales = torch.where((step > 0) & (norms > self.limit), self.limit / norms, 1.0)
        return w * scales.view(-1, *[1] * (w.dim() - 1))
