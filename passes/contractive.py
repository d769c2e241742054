"""The contractive penalty, on the derivatives of values."""

import torch
from torch import Tensor

from graphreg import Penalty, Selector, Vjp


class Contractive(Penalty, keys=("contractive",)):
    """Penalizes the Jacobian of the sites with respect to other values: its squared Frobenius norm, divided by the number of examples.

    Formula: ``sum (dz/dx)² / len(x)``, the sum over all elements of z and x. The Jacobian includes the derivatives of one example's z with
    respect to another example's x; a batch norm in train mode makes them nonzero. Where z does not depend on x, the Jacobian is 0.
    Shapes: z, at each site, and x, each value that ``wrt`` selects, [batch, any shape] -> 0-d.

    Args:
        weight: The strength, 0 or more.
        wrt: A selector of the values x to differentiate with respect to; ``"*"`` means the model's floating-point inputs.
        estimator: How to compute the formula. ``"projection"`` is an unbiased estimate from ``n`` random directions; each direction takes
            one backward pass for all sites together. ``"exact"`` takes one backward pass for each element of z. ``"mean"`` computes another
            formula, which theanets' code has: ``(d mean(z)/dx)²``, averaged over the elements of x, then over the selected values x.
        n: The number of random directions, a whole number, 1 or more. Leave it out for the other estimators.
        always: Whether the penalty acts in eval mode, too. By default, the penalty acts in train mode alone.

    Raises:
        GraphRegError: An operation between x and z cannot be differentiated twice.
        NoMatchError: ``wrt`` matches nothing.

    Averaged over: the sites. The results for several values x are added.
    Default sites: the hidden values, except the outputs of normalizations.
    Source: Rifai, Vincent, Muller, Glorot & Bengio, Contractive auto-encoders, ICML 2011, equation 5. For the random directions:
    Hoffman, Roberts & Yaida, Robust learning with Jacobian regularization, 2019, equation 9. They draw a normal vector and normalize it.
    This class draws random signs (Hutchinson, 1990), which need no normalization.
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
            # The vector 1 / n gives the derivative of the mean. A division of tensors, because n may be 0.
            means = [vjp({name: torch.ones_like(z) / z.numel()}) for name, z in vjp.sites.items()]
            return torch.stack([g.square().mean() for gradients in means for g in gradients.values()]).mean()
        if self.estimator == "exact":
            rows = [gradients for name in vjp.sites for gradients in vjp.rows(name)]
            return _squared(rows) / len(vjp.sites)
        # A mask of rate 0.5 becomes signs: 0 and 1 become -1 and 1.
        signs = {name: (2 * vjp.noise[name].keep(z.expand(self.n, *z.shape), 0.5) - 1).unbind() for name, z in vjp.sites.items()}
        # One backward pass serves all sites: the signs at different sites are independent, so the cross terms between sites have mean 0.
        rows = [vjp({name: drawn[i] for name, drawn in signs.items()}) for i in range(self.n)]
        return _squared(rows) / (self.n * len(vjp.sites))


def _squared(rows: list[dict[str, Tensor]]) -> Tensor:
    """Return the sum of squares over all rows of the Jacobian and all values x, divided for each x by the number of examples in x."""
    return torch.stack([g.square().sum() / (len(g) if g.dim() else 1) for gradients in rows for g in gradients.values()]).sum()
