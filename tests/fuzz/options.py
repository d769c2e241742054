"""Cases as graphreg is given them: instances or keywords, schedules, strengths by depth."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import graphreg.passes
from fuzz.cases import Case
from fuzz.choices import KEYS, Reg
from graphreg import by_depth, schedules
from graphreg.planning.keywords import from_keywords


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
    if case.keywords:
        return [*from_keywords(keywords(case.regs))]
    return [instance(reg) for reg in case.regs]


def instance(reg: Reg) -> Any:
    pattern = reg.pattern[0] if len(reg.pattern) == 1 else list(reg.pattern)
    return getattr(graphreg.passes, reg.kind)(pattern, strength(reg.weight), **reg.options)


def keywords(regs: list[Reg]) -> dict[str, Any]:
    """One regularizer of a kind as a dict of options; several as a dict of selectors, or as pairs where that cannot say it."""
    by_key: dict[str, list[Reg]] = {}
    for reg in regs:
        by_key.setdefault(KEYS[reg.kind], []).append(reg)
    return {key: _keyword(own) for key, own in by_key.items()}


def _keyword(regs: list[Reg]) -> Any:
    selectors = [reg.pattern[0] if len(reg.pattern) == 1 else reg.pattern for reg in regs]
    given = [{"weight": strength(reg.weight), **reg.options} for reg in regs]
    if len(regs) == 1:
        return {"pattern": selectors[0], **given[0]}
    if any(reg.options for reg in regs) or len(set(selectors)) < len(regs):
        return list(zip(selectors, given, strict=True))
    return dict(zip(selectors, (each["weight"] for each in given), strict=True))
