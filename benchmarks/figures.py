"""Medians with intervals."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

_LEVEL = 1.96  # of a normal distribution: 95 % lie within


@dataclass(frozen=True)
class Figure:
    """A median, and an interval that has the true one in it with a probability of 95 %, by order statistics.

    Of few values it is the whole range. The values are taken as independent, which neighbouring rounds are not quite.
    """

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


def figure(values: Sequence[float]) -> Figure:
    """The median of some values with its interval (Conover, Practical Nonparametric Statistics, 3.2)."""
    ordered, n = sorted(values), len(values)
    half = _LEVEL * math.sqrt(n) / 2
    low, high = max(0, math.floor(n / 2 - half)), min(n - 1, math.ceil(n / 2 + half))
    return Figure(statistics.median(ordered), ordered[low], ordered[high])


def ratio(values: Sequence[float], to: Sequence[float]) -> Figure:
    """The ratio of two series, taken round by round: a slow moment of the machine is in both."""
    return figure([value / other for value, other in zip(values, to, strict=True)])
