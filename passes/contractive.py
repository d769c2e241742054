"""Contraction: Rifai, Vincent, Muller, Glorot & Bengio, Contractive auto-encoders, ICML 2011, equation 5.

The estimate by random projections: Hoffman, Roberts & Yaida, Robust learning with Jacobian regularization, 2019,
equation 9, but with directions of random signs (Hutchinson, 1990), which need not be normalized.
"""

import torch
from torch import Tensor

from graphreg import Penalty, Selector, Vjp


class Contractive(Penalty, keys=("contractive",)):
    """The mean over sites of the squared Frobenius norm of the Jacobian per example: ``sum (dz/dx)² / len(x)``.

    z, at each site, and x, the values that ``wrt`` selects: [batch, any shape] -> 0-d. The Jacobian is that of the whole batch; the
    squares are summed over all x, and are 0 where z does not depend on x. ``weight`` >= 0.

    Attributes:
        wrt: What to differentiate with respect to; ``"*"`` means the floating-point inputs.
        estimator: ``"projection"`` on ``n`` random directions, unbiased, one backward pass each for all sites; ``"exact"``, one
            backward pass for each element of z; ``"mean"``, as in theanets' code: the mean over x of (d mean(z)/dx)², averaged over
            the values that ``wrt`` selects.
        n: The number of random directions, >= 1.
        always: Act in eval mode too; by default the penalty acts in train mode only.

    Raises:
        GraphRegError: An operation on the way cannot be differentiated twice.
        NoMatchError: ``wrt`` matches nothing.
    """

    wrt: Selector = "*"
    estimator: str = "projection"
    n: int = 1
    always: bool = False

    def check(self) -> None:
        super().check()
        self.require(self.estimator in ("projection", "exact", "mean"), "estimator", "'projection', 'exact' or 'mean'")
        self.require(type(self.n) is int and self.n >= 1, "n", "a whole number, 1 or more")
        self.require(self.n == 1 or self.estimator == "projection", "n", f"left out: estimator={self.estimator!r} draws nothing")
        self.require(isinstance(self.always, bool), "always", "True or False")

    def __call__(self, vjp: Vjp) -> Tensor:
        if self.estimator == "mean":
            means = [vjp({name: torch.full_like(z, 1 / z.numel())}) for name, z in vjp.sites.items()]
            return torch.stack([g.square().mean() for gradients in means for g in gradients.values()]).mean()
        if self.estimator == "exact":
            rows = [gradients for name in vjp.sites for gradients in vjp.rows(name)]
            return _squared(rows) / len(vjp.sites)
        signs = {name: (2 * vjp.noise[name].keep(z.expand(self.n, *z.shape), 0.5) - 1).unbind() for name, z in vjp.sites.items()}
        # the directions of different sites are independent, so the products between sites vanish in the mean
        rows = [vjp({name: drawn[i] for name, drawn in signs.items()}) for i in range(self.n)]
        return _squared(rows) / (self.n * len(vjp.sites))


def _squared(rows: list[dict[str, Tensor]]) -> Tensor:
    """Return the sum of squares per example, over all rows of the Jacobian and all values of ``wrt``."""
    return torch.stack([g.square().sum() / (len(g) if g.dim() else 1) for gradients in rows for g in gradients.values()]).sum()
