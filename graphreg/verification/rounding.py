"""Tells a difference between two gradients that is one of rounding from one that is not.

Autograd adds the gradients that reach a value in the order in which the value's readers ran. A sum
of three has another rounding in another order, and the order may change where a splice separates
what was one tensor: its result is another one than its input, while a dropout in eval mode or an
``nn.Identity`` returns its input itself. So a graph that is the model may have other last bits in
its gradients. The rounding of a sum depends on the precision, and a fault does not. So the calls
are repeated in another precision, and the difference of a gradient must shrink, or grow, as the
precision does.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from graphreg.tracing.proof.values import difference


def is_rounding(here: tuple[Tensor, Tensor], there: tuple[Tensor | None, Tensor | None] | None) -> bool:
    """Return whether the difference between the numbers of two gradients is one of rounding.

    Rounding changes as the epsilon of the dtype does, a fault not at all; the limit lies between
    the two, at the square root. If the calls could not be repeated, or the difference has vanished
    in a narrower dtype, the difference must be within ``NEAR`` of ``values.py``.

    Args:
        here: The model's gradient, and the module's.
        there: The same in another precision; None if the calls could not be repeated in it.
    """
    one, other = there or (None, None)
    if one is not None and other is not None and one.shape == other.shape:
        ratio = math.sqrt(torch.finfo(one.dtype).eps / torch.finfo(here[0].dtype).eps)
        now, then = _apart(*here), _apart(one, other)
        if math.isfinite(now) and (then <= now * ratio if ratio < 1 else then >= now * ratio):
            return True
        if then:
            return False
    return not difference(*here, near=True)


def _apart(one: Tensor, other: Tensor) -> float:
    """Return the largest difference; 0 where both are the same infinity or NaN, infinity where one alone is."""
    wide = torch.complex128 if one.is_complex() else torch.float64
    a, b = (each.detach().to_dense() if each.layout != torch.strided else each.detach() for each in (one, other))
    same = (a == b) | (a.isnan() & b.isnan())
    apart = (a.to(wide) - b.to(wide)).abs().masked_fill(same, 0.0).nan_to_num(nan=torch.inf)
    return float(apart.max()) if apart.numel() else 0.0
