"""What a call of a stage must know of the pipeline schedule: how it scales gradients, and whether the call only finds out shapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

from torch import nn

from graphreg.errors import GraphRegError, listed
from graphreg.runtime.attach import Scale, factors
from graphreg.session.hosts import session_of
from graphreg.torch_internals.dynamo_marks import disable
from graphreg.torch_internals.pipelining import PipelineRun, pipeline_run


@dataclass(frozen=True)
class StageCalls:
    """Checks at each call of a stage that the pipeline schedule is one for which the stage was regularized.

    Attributes:
        microbatches: The number of microbatches in a step, as ``regularize_stage`` was told.
        scale_grads: Whether the schedule divides the gradients by ``microbatches`` at the end of a step, as ``regularize_stage`` was told.
        of_parameters: The names of the stage's penalties whose gradients go to parameters and to no value. With such penalties, a schedule
            that splits the backward pass is refused.
    """

    microbatches: int
    scale_grads: bool
    of_parameters: tuple[str, ...] = ()

    @disable()
    def begin(self, module: nn.Module) -> Mapping[str, Any] | None:
        """Begin a call of the stage. Return the argument ``before`` for ``end``: the state of the noise if the call only finds out shapes.

        Raises:
            GraphRegError: The schedule has other settings than ``regularize_stage`` was told, or splits the backward pass although
                ``of_parameters`` is not empty.
        """
        # The schedule is found on Python's stack, so Dynamo must not trace this method.
        run = pipeline_run()
        if run is not None and run.schedule is not None and module.training:
            self._check(run)
        return session_of(module).saved() if run is not None and run.is_rehearsal else None

    @disable()
    def end(self, module: nn.Module, before: Mapping[str, Any] | None) -> None:
        """End a call. A call that only finds out shapes does not count: reset the noise and the clock to their state before the call."""
        if before is not None:
            session_of(module).load(before)

    def _check(self, run: PipelineRun) -> None:
        if (run.microbatches, run.scale_grads) != (self.microbatches, self.scale_grads):
            raise GraphRegError(
                f"the schedule has n_microbatches={run.microbatches} and scale_grads={run.scale_grads}, and regularize_stage was told "
                f"microbatches={self.microbatches}, scale_grads={self.scale_grads}, so the penalties would have another strength. Give "
                "regularize_stage what the schedule has."
            )
        if self.of_parameters and run.splits_backward:
            kind = type(run.schedule).__name__
            raise GraphRegError(
                f"{listed(self.of_parameters)} acts on parameters, and {kind} computes the gradients of parameters from saved gradients of "
                "values, which these penalties do not have. Use a schedule that does not split the backward pass, such as "
                "ScheduleInterleaved1F1B, or leave the penalty out and give the optimizer a weight_decay."
            )


class StageScale:
    """The scale of a stage's penalties in one microbatch, for a schedule that sums the gradients of all microbatches without dividing them.

    Attributes:
        scale: The scale of the loss, as ``scale=`` of ``regularize``.
        parts: The number of microbatches in a step. Each microbatch adds 1 / ``parts`` of the penalties' gradient.
        __name__: The scale in words, for reports.
    """

    def __init__(self, scale: Scale | None, parts: int) -> None:
        self.scale, self.parts = scale, parts
        self.__name__ = f"1/{parts} in each microbatch"

    def of_call(self, args: Sequence[Any], kwargs: Mapping[str, Any], reads: Set[str]) -> tuple[Any, Any]:
        """Return two factors: for penalties whose gradients join the backward pass, and for penalties that are added to the stage's loss.

        Only the first is divided by ``parts``. If the stage returns a loss, the user scales it, and so scales the penalties in it, too.
        """
        gradient, share = factors(self.scale, args, kwargs, reads)
        return gradient / self.parts, share
