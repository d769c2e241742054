"""Strengths that are no single number, as plain data, and what they are at a site in a call, by docs/training.md and docs/depth.md.

A schedule is ``{"schedule": ["linear", first, last, steps, every]}``, or ``"cosine"``, or ``["piecewise", [[step, value], ...], every]``;
a strength by depth is ``{"depth": [first, last]}``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

Plain = float | dict[str, Any]


def written(weight: Plain) -> str:
    """As Python writes it."""
    if not isinstance(weight, dict):
        return repr(weight)
    if "depth" in weight:
        return f"by_depth({', '.join(map(repr, weight['depth']))})"
    kind, *rest = weight["schedule"]
    if kind == "piecewise":
        return f"schedules.piecewise({dict(map(tuple, rest[0]))!r}, every={rest[1]})"
    return f"schedules.{kind}({rest[0]!r}, {rest[1]!r}, {rest[2]}, every={rest[3]})"


def scheduled(schedule: Sequence[Any], call: int) -> float:
    """The strength of a schedule in a call in train mode, counted from 0."""
    kind = schedule[0]
    if kind == "piecewise":
        values, every = schedule[1:]
        return [float(value) for step, value in sorted(values) if step <= call // every][-1]
    first, last, steps, every = schedule[1:]
    share = min(call // every / steps, 1.0)
    if kind == "cosine":
        share = 0.5 - 0.5 * math.cos(math.pi * share)
    return float(first + (last - first) * share)


def ramped(ends: Sequence[float], blocks: Sequence[str]) -> dict[str, float]:
    """By block, evenly spaced, of blocks in the order in which they run."""
    first, last = ends
    shares = [i / (len(blocks) - 1) for i in range(len(blocks))]
    return {block: first * (1 - share) + last * share for block, share in zip(blocks, shares, strict=True)}  # the ends to the bit


class Strengths:
    """The strength of every regularizer at every site: ``depth`` where it is by depth, ``changes`` what is set before which call."""

    def __init__(self, weights: Mapping[str, Plain], depth: Mapping[str, Mapping[str, float]], changes: Sequence[Sequence[Any]]) -> None:
        self.weights, self.depth, self.changes = dict(weights), depth, changes
        self.given: dict[str, Plain | dict[str, float]] = {}
        self.at_sites: dict[tuple[str, str], float] = {}
        self.clock = 0  # calls in train mode until now

    def change(self, number: int) -> list[tuple[str, Any]]:
        """What is set before a call: (name, what ``set_strength`` is given). From then on it counts here, too."""
        told = []
        for call, name, given, sites in self.changes:
            if call != number:
                continue
            told.append((name, given))
            if isinstance(given, dict):
                self.at_sites.update({(name, site): value for site, value in sites.items()})
            else:
                self.weights[name] = given
                self.at_sites = {key: value for key, value in self.at_sites.items() if key[0] != name}
                self.depth = {key: value for key, value in self.depth.items() if key != name}
        return told

    def of(self, name: str, site: str) -> float:
        if (name, site) in self.at_sites:
            return self.at_sites[name, site]
        if name in self.depth and site in self.depth[name]:
            return self.depth[name][site]
        weight = self.weights[name]
        if not isinstance(weight, dict):
            return float(weight)
        return scheduled(weight["schedule"], self.clock)
