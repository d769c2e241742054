"""What ``torch.distributed.pipelining`` is doing while it calls a stage: it passes a stage nothing but the stage's arguments."""

from __future__ import annotations

import sys
from dataclasses import dataclass

_STAGES, _SCHEDULES = "torch.distributed.pipelining.stage", "torch.distributed.pipelining.schedules"
# The functions that run a stage to find out the shapes of its values: of torch 2.13, of torch 2.10 to 2.12, and of its constructor there.
_REHEARSALS = ("_forward_metadata_inference", "_shape_inference", "__init__")


@dataclass(frozen=True)
class PipelineRun:
    """How a schedule calls a stage.

    Attributes:
        is_rehearsal: Whether torch runs the stage only to find out the shapes of its values.
        microbatches: The number of microbatches in a step; None if no schedule runs.
        scale_grads: Whether the schedule divides the gradients by this number at the end of a step; None if no schedule runs.
    """

    is_rehearsal: bool
    microbatches: int | None
    scale_grads: bool | None


def pipeline_run() -> PipelineRun | None:
    """Return how a schedule of ``torch.distributed.pipelining`` calls the code that is running; None if none does."""
    if _STAGES not in sys.modules:
        return None
    is_rehearsal, frame = None, sys._getframe(1)
    while frame is not None:
        where = frame.f_globals.get("__name__")
        if where == _STAGES:
            is_rehearsal = bool(is_rehearsal) or frame.f_code.co_name in _REHEARSALS
        elif where == _SCHEDULES and is_rehearsal is not None and hasattr(schedule := frame.f_locals.get("self"), "scale_grads"):
            return PipelineRun(is_rehearsal, schedule._n_microbatches, schedule.scale_grads)
        frame = frame.f_back
    return None if is_rehearsal is None else PipelineRun(is_rehearsal, None, None)
