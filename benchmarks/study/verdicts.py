"""Differences over the seeds, their intervals, and whether a claim is shown."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from scipy.special import stdtrit  # type: ignore[import-untyped]

from study.arms import ARMS, SEEDS
from study.claims import Check, Claim
from study.run import written

Records = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Found:
    """A check's means, and the mean of the differences over the seeds with its 95 % interval."""

    check: Check
    value: float
    against: float
    low: float
    high: float

    @property
    def effect(self) -> float:
        return (self.low + self.high) / 2

    @property
    def holds(self) -> bool:
        return self.low > -self.check.margin if self.check.better == "higher" else self.high < self.check.margin

    @property
    def opposite(self) -> bool:
        """Whether the interval lies on the other side of 0."""
        return self.high < 0 if self.check.better == "higher" else self.low > 0


def values(records: Records, arm: str, measure: str) -> list[float]:
    record = records[arm]
    runs = record["runs"][written(record["chosen"])]
    return [runs[str(seed)][measure] for seed in SEEDS]


def interval(differences: list[float]) -> tuple[float, float]:
    """The 95 % interval of the mean by Student's t."""
    count = len(differences)
    half = float(stdtrit(count - 1, 0.975)) * stdev(differences) / count**0.5
    return fmean(differences) - half, fmean(differences) + half


def found(records: Records, claim: Claim, check: Check) -> Found:
    """A comparison: seed by seed, with the same training rows, initial weights and batches."""
    ours = values(records, claim.arm, check.measure)
    than = check.than
    theirs = values(records, than, check.other or check.measure) if isinstance(than, str) else [than] * len(ours)
    low, high = interval([a - b for a, b in zip(ours, theirs, strict=True)])
    return Found(check, fmean(ours), fmean(theirs), low, high)


def ready(records: Records, claim: Claim) -> bool:
    """Whether all arms of a claim have run under the present protocol."""
    names = {claim.arm, *(check.than for check in claim.checks if isinstance(check.than, str))}
    return all(_complete(records, name) for name in names)


def _complete(records: Records, name: str) -> bool:
    record = records.get(name, {})
    if record.get("digest") != ARMS[name].digest or "chosen" not in record:
        return False
    return all(str(seed) in record["runs"].get(written(record["chosen"]), {}) for seed in SEEDS)
