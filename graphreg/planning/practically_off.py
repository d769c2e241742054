"""Finds penalties on parameters whose strength is so small that they change nothing.

The usual cause is a strength that was chosen as a weight decay, for a penalty that is a mean over many elements.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from graphreg.ir import Site
from graphreg.regularizer import Penalty, Regularizer

# A weight decay of 1e-7 shrinks a weight by 1 % in a million steps of SGD at a learning rate of 0.1.
FAINTEST = 1e-7


def practically_off(regularizer: Regularizer, strengths: Sequence[tuple[Site, float]], of: int | None = None) -> str:
    """Return a note if a penalty's gradient is too small to matter; ``""`` if it is not, or if it is not known.

    Args:
        regularizer: The regularizer.
        strengths: The sites of the penalty, each with its strength. Where all strengths are 0, the penalty is off on purpose.
        of: Over how many sites the penalty is a mean; None for the number of ``strengths``.
    """
    if not isinstance(regularizer, Penalty) or regularizer.on != "parameters" or regularizer.is_scheduled:
        return ""
    is_mean = regularizer.engine_options.reduction == "mean"
    pulls = []
    for site, strength in strengths:
        slope = regularizer.slope(math.prod(site.shape)) if site.shape is not None else None
        if slope is None:
            return ""
        pulls.append(abs(strength) * slope / ((of or len(strengths)) if is_mean else 1))
    if not 0 < max(pulls, default=0.0) < FAINTEST:
        return ""
    pull = f"practically off: it pulls a weight of 1 like a weight_decay of {max(pulls):.2g} in SGD, or less"
    return f"{pull}; give a larger weight" + ", or reduction='sum'" * is_mean
