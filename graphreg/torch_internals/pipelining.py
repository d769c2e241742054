"""Finds out how ``torch.distributed.pipelining`` calls a stage, because it passes the stage nothing but the stage's arguments."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from graphreg.torch_internals.interpreter import outwards

_STAGES, _SCHEDULES = "torch.distributed.pipelining.stage", "torch.distributed.pipelining.schedules"
# The names of torch's functions that run a stage to find out the shapes of its values: in torch 2.13 the first one; in torch 2.10 to 2.12
# the second one, and the constructor of the stage.
_REHEARSALS = ("_forward_metadata_inference", "_shape_inference", "__init__")


@dataclass(frozen=True)
class PipelineRun:
    """How a stage is called.

    Attributes:
        is_rehearsal: Whether torch runs the stage only to find out the shapes of its values.
        schedule: The schedule that runs; None if none does.
    """

    is_rehearsal: bool
    schedule: Any = None

    @property
    def microbatches(self) -> int:
        """The number of microbatches in a step of the schedule."""
        return int(self.schedule._n_microbatches)

    @property
    def scale_grads(self) -> bool:
        """Whether the schedule divides the gradients by the number of microbatches at the end of a step."""
        return bool(self.schedule.scale_grads)

    @property
    def splits_backward(self) -> bool:
        """Whether the schedule computes the gradients of a stage's parameters apart from those of its inputs, in a second pass."""
        order: dict[int, Any] = getattr(self.schedule, "pipeline_order", {})
        return any(action is not None and action.computation_type.name == "BACKWARD_WEIGHT" for each in order.values() for action in each)


def pipeline_run() -> PipelineRun | None:
    """Return how ``torch.distributed.pipelining`` calls the code that is running; None if it does not call it."""
    if _STAGES not in sys.modules:
        return None
    is_rehearsal: bool | None = None
    for frame in outwards(sys._getframe(1)):
        where = frame.f_globals.get("__name__")
        if where == _STAGES:
            is_rehearsal = bool(is_rehearsal) or frame.f_code.co_name in _REHEARSALS
        elif where == _SCHEDULES and is_rehearsal is not None and hasattr(schedule := frame.f_locals.get("self"), "scale_grads"):
            return PipelineRun(is_rehearsal, schedule)
    return None if is_rehearsal is None else PipelineRun(is_rehearsal)
