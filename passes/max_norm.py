"""Rows of weights that are not too long: the max-norm constraint of Srivastava et al., JMLR 15 (2014), section 5.1, as a penalty."""

import torch
from torch import Tensor

from graphreg import Penalty, required


class MaxNorm(Penalty, keys=("max_norm",), on="parameters"):
    """How far the norms of rows are above a limit, squared and summed over rows: ``sum max(0, |row| - limit)²``.

    w: [rows, ...] -> 0-d, averaged over the selected parameters, by default all of 2 dims or more. A row has the weights of one output
    unit or channel, or of one entry of an Embedding. Rows within the limit cost nothing. ``weight`` >= 0.

    Attributes:
        limit: The norm up to which a row costs nothing, above 0; it must be given.
        reduction: ``"mean"`` or ``"sum"``, over parameters.
    """

    limit: float = required()
    reduction: str = "mean"

    def check(self) -> None:
        super().check()
        self.require_number("limit", lambda limit: limit > 0, "above 0")

    def __call__(self, w: Tensor) -> Tensor:
        norms: Tensor = torch.linalg.vector_norm(w.flatten(1), dim=1)
        return (norms - self.limit).relu().square().sum()
