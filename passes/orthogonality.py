"""Soft orthogonality of weights."""

import torch
from torch import Tensor

from graphreg import Penalty


class Orthogonality(Penalty, keys=("orthogonality",), on="parameters"):
    """Penalizes weights whose rows (or columns, if a weight has more rows than columns) are not orthonormal.

    Formula: ``|W Wᵀ - I|²``, the squared Frobenius norm, or ``|Wᵀ W - I|²`` if W has more rows than columns.
    Shapes: w [out, in, ...], read as the matrix W [out, product of the other dims] -> 0-d.

    Args:
        weight: The strength, 0 or more.
        reduction: ``"mean"`` or ``"sum"``, over the parameters.

    Averaged over: the parameters.
    Default sites: the parameters of 2 dims or more, without biases and norms.
    Source: Bansal, Chen & Wang, Can we gain more from orthogonality regularizations in training deep networks?, NeurIPS 2018, section 3.1.
    The paper adds over the parameters, as ``reduction="sum"`` does.
    """

    reduction: str = "mean"

    def __call__(self, w: Tensor) -> Tensor:
        rows = w.flatten(1)
        # More rows than columns cannot be orthonormal.
        rows = rows.T if rows.shape[0] > rows.shape[1] else rows
        return (rows @ rows.T - torch.eye(len(rows), dtype=w.dtype, device=w.device)).square().sum()
