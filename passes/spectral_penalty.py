"""Spectral norm regularization: Yoshida & Miyato, Spectral norm regularization for improving the generalizability of deep learning, 2017,
section 3."""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from graphreg import Penalty

START = 15  # iterations for the first estimate, as in torch.nn.utils.parametrizations.spectral_norm


class SpectralPenalty(Penalty, keys=("spectral",), on="parameters"):
    """The square s² of a weight's largest singular value s, averaged over the selected parameters.

    w: [out, in, ...], read as the matrix W [out, the rest] -> 0-d, by default each parameter of 2 dims or more. ``weight`` >= 0; it is the
    paper's λ/2 with ``reduction="sum"``. s is estimated from below by power iteration, which goes on from call to call in train mode:
    ``rng_state`` saves the vector that it has come to. The gradient is 2s·u vᵀ, for the singular vectors u and v as estimated.

    Attributes:
        reduction: ``"mean"``, or ``"sum"`` over parameters, as in the paper.
        iterations: How many power iterations a call makes, a whole number, 1 or more.
    """

    reduction: str = "mean"
    iterations: int = 1

    def check(self) -> None:
        super().check()
        self.require(type(self.iterations) is int and self.iterations >= 1, "iterations", "a whole number, 1 or more")

    def init_state(self, like: Tensor) -> dict[str, Tensor]:
        matrix = like.flatten(1).to(torch.promote_types(like.dtype, torch.float32))
        u = torch.randn(len(matrix), generator=torch.Generator().manual_seed(0), dtype=matrix.dtype).to(matrix.device)
        return {"u": self._vectors(matrix, u, START)[0]}

    def __call__(self, w: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        matrix = w.flatten(1)
        u, v = self._vectors(matrix.detach(), state["u"], self.iterations)
        return (u @ matrix @ v).square(), {"u": u}

    def _vectors(self, matrix: Tensor, u: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
        """Estimate the first singular vectors, [out] and [the rest], from u on."""
        v = u
        for _ in range(iterations):
            v = normalize(matrix.T @ u, dim=0)
            u = normalize(matrix @ v, dim=0)
        return u, v
