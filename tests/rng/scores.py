"""How far draws are from random ones, in standard errors: what the tests of the streams share."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def chi_square(observed: Tensor, expected: float) -> float:
    """As standard normal (Wilson & Hilferty 1931)."""
    df = observed.numel() - 1
    statistic = float((observed.double() - expected).square().sum() / expected)
    return (math.cbrt(statistic / df) - (1 - 2 / (9 * df))) / math.sqrt(2 / (9 * df))


def uniform_over(values: Tensor, cells: int) -> float:
    """Whole numbers in [0, cells), as a chi-square of their counts."""
    return chi_square(torch.bincount(values, minlength=cells), values.numel() / cells)


def correlation(a: Tensor, b: Tensor) -> float:
    a, b = a.double() - a.double().mean(), b.double() - b.double().mean()
    return float((a * b).mean() / (a.std() * b.std()) * math.sqrt(a.numel()))


def collisions(draws: Tensor) -> float:
    """Birthdays: the number of 32-bit words that repeat another, which is nearly Poisson."""
    n, m = draws.numel(), 2.0**32
    repeated: int = n - torch.unique(draws).numel()
    expected = n - m * -math.expm1(n * math.log1p(-1 / m))
    return (repeated - expected) / math.sqrt(expected)


def spacings(draws: Tensor) -> float:
    """Birthday spacings (Marsaglia & Tsang 2002) of unsigned 32-bit words [n], n a multiple of 4096.

    The repeats among the spacings of m = 4096 birthdays in a year of 2**32 days are Poisson of mean m**3 / 2**34 = 4; the
    sum over all groups of 4096 is compared with its own mean.
    """
    groups = draws.view(-1, 4096).sort(dim=1).values
    apart = torch.diff(groups, dim=1, prepend=torch.zeros(groups.shape[0], 1, dtype=groups.dtype)).sort(dim=1).values
    repeated, expected = int((torch.diff(apart, dim=1) == 0).sum()), 4.0 * groups.shape[0]
    return (repeated - expected) / math.sqrt(expected)


def moment(z: Tensor, power: int) -> float:
    """The mean of z**power against that of the standard normal, (power - 1)!! or 0."""
    expected, square = (math.prod(range(1, n, 2)) if n % 2 == 0 else 0 for n in (power, 2 * power))
    return (float((z.double() ** power).mean()) - expected) / math.sqrt((square - expected**2) / z.numel())


def tail(z: Tensor, bound: float) -> float:
    """The number of values beyond a positive ``bound``, or below a negative one."""
    expected = z.numel() * math.erfc(abs(bound) / math.sqrt(2)) / 2
    return (int((z > bound if bound > 0 else z < bound).sum()) - expected) / math.sqrt(expected)
