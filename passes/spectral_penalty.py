"""Spectral norm regularization."""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from graphreg import Penalty

START = 15  # the number of power iterations for the first estimate, as in torch.nn.utils.parametrizations.spectral_norm


class SpectralPenalty(Penalty, keys=("spectral",), on="parameters"):
    """Penalizes the largest singular value of a weight.

    Formula: ``s²``, where s is the largest singular value. Power iteration estimates s, and the estimate is never above s. Each call begins
    with the estimate of the left singular vector u from the last call in train mode. This estimate is in no ``state_dict``, but
    in the result of ``graphreg.rng_state``.
    The gradient is ``2 s u vᵀ``, with the estimates of s and of the singular vectors u and v.
    Shapes: w [out, in, ...], read as the matrix W [out, product of the other dims] -> 0-d.

    Args:
        weight: The strength, 0 or more. With ``reduction="sum"``, it is the paper's λ/2.
        reduction: ``"mean"`` or ``"sum"``, over the parameters.
        iterations: The number of power iterations in each call, a whole number, 1 or more.

    Averaged over: the parameters.
    Default sites: the parameters of 2 dims or more, without biases and norms.
    Source: Yoshida & Miyato, Spectral norm regularization for improving the generalizability of deep learning, 2017, section 3. The paper
    adds over the parameters.
    """

    reduction: str = "mean"
    iterations: int = 1

    def check(self) -> None:
        super().check()
        self.require(type(self.iterations) is int and self.iterations >= 1, "iterations", "a whole number, 1 or more")

    def init_state(self, like: Tensor) -> dict[str, Tensor]:
        matrix = like.flatten(1).to(torch.promote_types(like.dtype, torch.float32))
        # The same start on every rank and device, and no draw from the user's generator.
        u = torch.randn(len(matrix), generator=torch.Generator().manual_seed(0), dtype=matrix.dtype, device="cpu")
        return {"u": self._vectors(matrix, u.to(matrix.device), START)[0]}

    def __call__(self, w: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        matrix = w.flatten(1)
        # Detached: by the formula of the gradient, u and v are constants.
        u, v = self._vectors(matrix.detach(), state["u"], self.iterations)
        return (u @ matrix @ v).square(), {"u": u}

    def _vectors(self, matrix: Tensor, u: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
        """Estimate the singular vectors u [out] and v [product of the other dims] of the largest singular value, beginning with ``u``."""
        v = u
        for _ in range(iterations):
            v = normalize(matrix.T @ u, dim=0)
            u = normalize(matrix @ v, dim=0)
        return u, v
