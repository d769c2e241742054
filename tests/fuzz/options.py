"""Cases as graphreg is given them: instances or keywords, schedules, strengths by depth."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import graphreg.passes
from fuzz.cases import Case
from fuzz.choices import Reg
from graphreg import by_depth, schedules


def strength(weight: Any) -> Any:
    """A number, a schedule, or a strength by depth; or a dict of selectors to numbers."""
    if not isinstance(weight, Mapping):
        return weight
    if "depth" in weight:
        return by_depth(*weight["depth"])
    if "schedule" not in weight:
        return dict(weight)
    kind, *rest = weight["schedule"]
    if kind == "piecewise":
        return schedules.piecewise(dict(map(tuple, rest[0])), every=rest[1])
    return getattr(schedules, kind)(*rest[:3], every=rest[3])


def made(case: Case) -> list[Any]:
    """The regularizers of a case."""
    return [instance(reg) for reg in case.regs]


def instance(reg: Reg) -> Any:
    pattern = reg.pattern[0] if len(reg.pattern) == 1 else list(reg.pattern)
    return getattr(graphreg.passes, reg.kind)(pattern, strength(reg.weight), **reg.options)
