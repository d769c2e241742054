"""Orthogonal weights: the soft orthogonality of Bansal, Chen & Wang, Can we gain more from orthogonality regularizations?, NeurIPS 2018,
section 3.1."""

import torch
from torch import Tensor

from graphreg import Penalty


class Orthogonality(Penalty, keys=("orthogonality",), on="parameters"):
    """The squared distance of the Gram matrix of a weight from the identity: ``|W Wᵀ - I|²``.

    w: [out, in, ...], read as the matrix W [out, the rest] -> 0-d, averaged over the selected parameters, by default all of 2 dims or
    more. W Wᵀ is taken of the smaller side: rows are made orthonormal, and columns (Wᵀ W) where there are more rows than columns.
    ``weight`` >= 0.

    Attributes:
        reduction: ``"mean"``, or ``"sum"`` over parameters, as in the paper.
    """

    reduction: str = "mean"

    def __call__(self, w: Tensor) -> Tensor:
        rows = w.flatten(1)
        rows = rows.T if rows.shape[0] > rows.shape[1] else rows
        return (rows @ rows.T - torch.eye(len(rows), dtype=w.dtype, device=w.device)).square().sum()
