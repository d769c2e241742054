"""The canary of torch's pipelines.

In each ``@canary``, the first text completes "torch changed how …", the second "this concerns …"; then come the tested names.
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe, ScheduleInterleavedZeroBubble

import graphreg.torch_internals as door
from graphreg.torch_internals import PipelineRun
from graphreg.torch_internals.canaries.canary import canary


class _Stage(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.seen: list[PipelineRun | None] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(door.pipeline_run())
        return self.layer(x)  # type: ignore[no-any-return]


@canary("torch.distributed.pipelining calls a stage", "the stages of pipelines", "PipelineRun", "pipeline_run")
def pipeline() -> None:
    assert door.pipeline_run() is None
    hook, x = sys.excepthook, torch.ones(4, 2)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for kind, splits, whole in ((ScheduleGPipe, False, False), (ScheduleInterleavedZeroBubble, True, True)):
            module = _Stage()
            stage = PipelineStage(module, 0, 1, torch.device("cpu"))
            options = {"n_microbatches": 2, "loss_fn": lambda output, target: output.sum(), "scale_grads": whole}
            kind([stage] if splits else stage, **options).step(x, target=x)  # type: ignore[operator]
            runs = [run for run in module.seen if run is not None]
            assert [run.is_rehearsal for run in runs] == [True, False, False]
            assert {(run.microbatches, run.scale_grads, run.splits_backward) for run in runs[1:]} == {(2, whole, splits)}
    finally:
        dist.destroy_process_group()
        sys.excepthook = hook  # which init_process_group puts its own around
