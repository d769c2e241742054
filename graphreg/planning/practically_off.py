"""Finds penalties whose strength is so small that they change nothing.

The usual cause is a strength that was chosen as a weight decay, for a penalty that is a mean over
many elements.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields

from graphreg.errors import listed
from graphreg.ir.site import Site
from graphreg.regularizer.base import Penalty, Regularizer

# A weight decay of 1e-7 shrinks a weight by 1 % in a million steps of SGD at a learning rate of
# 0.1.
FAINTEST = 1e-7


def practically_off(regularizer: Regularizer, strengths: Sequence[tuple[Site, float]], of: int | None = None) -> str:
    """Return a note if a penalty's gradient is too small to matter at some sites; ``""`` if there are none, or if it is not known.

    Args:
        regularizer: The regularizer.
        strengths: The sites of the penalty, each with its strength. Where the strength is 0, the
            penalty is off on purpose.
        of: Over how many sites the penalty is a mean; None for the number of ``strengths``.
    """
    if not isinstance(regularizer, Penalty) or regularizer.is_scheduled:
        return ""

    is_mean = regularizer.engine_options.reduction == "mean"
    faint = dict[str, float]()
    for site, strength in strengths:
        # What a mean over many units takes from the pull at one of them, the many weights that make
        # the unit add again: for a value, the mean weakens nothing. For a parameter it does, by the
        # number of its elements; None if its shape is unknown.
        count = 1 if site.kind == "value" else None if site.shape is None else math.prod(site.shape)
        slope = None if count is None else regularizer.slope(count)
        if slope is None:
            return ""
        pull = abs(strength) * slope / ((of or len(strengths)) if is_mean else 1)
        if 0 < pull < FAINTEST:
            faint[site.name] = pull

    if not faint:
        return ""
    kind, pulled = regularizer.on, "a weight" if regularizer.on == "parameters" else "a value"
    where = f" at {len(faint)} of {len(strengths)} {kind} ({listed(list(faint), 3)}): there" if len(faint) < len(strengths) else ":"
    most = f"{where} it pulls {pulled} of 1 like a weight_decay of {max(faint.values()):.2g} in SGD, or less"
    has_sum = is_mean and any(field.name == "reduction" for field in fields(regularizer))
    return f"practically off{most}; give a larger weight" + ", or reduction='sum'" * has_sum
