"""Canaries of torch's wrappers and pipelines for training on several devices."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from canary import compiled
from graphreg.torch_internals import distributed, dynamo, modules, pipelining, torch_modes
from graphreg.torch_internals.pipelining import PipelineRun

if dist.is_available():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp._common_utils import FSDP_WRAPPED_MODULE
    from torch.distributed.pipelining import PipelineStage, ScheduleGPipe, ScheduleInterleavedZeroBubble


@contextmanager
def _group() -> Iterator[None]:
    """Open a block in which this process is the only member of a process group."""
    hook = sys.excepthook  # init_process_group replaces it
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        dist.destroy_process_group()
        sys.excepthook = hook


class _Stage(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.seen: list[PipelineRun | None] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(pipelining.pipeline_run())
        return self.layer(x)  # type: ignore[no-any-return]


def test_pipeline() -> None:
    """How torch.distributed.pipelining calls a stage. It concerns the stages of pipelines."""
    assert pipelining.pipeline_run() is None
    if not dist.is_available():
        return
    x = torch.ones(4, 2)
    with _group():
        kinds: list[tuple[Any, bool, bool]] = [(ScheduleGPipe, False, False), (ScheduleInterleavedZeroBubble, True, True)]
        for kind, splits, whole in kinds:
            module = _Stage()
            stage = PipelineStage(module, 0, 1, torch.device("cpu"))
            options: Any = {"n_microbatches": 2, "loss_fn": lambda output, target: output.sum(), "scale_grads": whole}
            kind([stage] if splits else stage, **options).step(x, target=x)
            runs = [run for run in module.seen if run is not None]
            assert [run.is_rehearsal for run in runs] == [True, False, False]
            assert {(run.microbatches, run.scale_grads, run.splits_backward) for run in runs[1:]} == {(2, whole, splits)}


def test_wrappers() -> None:
    """How a wrapper holds its module. It concerns the names in graphreg's backend."""
    if not dist.is_available():
        return
    module = nn.Linear(2, 2)
    with _group():
        made: tuple[Any, ...] = (DistributedDataParallel(module), DataParallel(module), checkpoint_wrapper(module), torch.compile(module))
        for wrapper in made:
            assert modules.wrapped_module(wrapper) is module, type(wrapper).__name__
    sharded = FullyShardedDataParallel.__new__(FullyShardedDataParallel)  # its constructor needs an accelerator
    nn.Module.__init__(sharded)
    setattr(sharded, FSDP_WRAPPED_MODULE, module)
    assert modules.wrapped_module(sharded) is module and modules.wrapped_module(nn.Sequential(module)) is None


def test_buckets() -> None:
    """How Dynamo splits a graph for DistributedDataParallel. It concerns the error of graphreg's backend about optimize_ddp."""
    seen: list[bool] = []
    if not dist.is_available():
        return
    for size, optimize, parts in ((8, True, [False]), (520, True, [True, True]), (520, False, [False])):
        model, x = nn.Sequential(nn.Linear(8, size), nn.Linear(size, size), nn.Linear(size, 2)), torch.ones(2, 8)
        with _group(), mock.patch.object(torch._dynamo.config, "optimize_ddp", optimize):
            DistributedDataParallel(compiled(model, lambda gm, inputs: seen.append(dynamo.splits_for_ddp())))(x)
        assert seen == parts, (size, optimize)
        seen.clear()
        torch.compiler.reset()


def test_collectives() -> None:
    """How operators that communicate are named. It concerns the proof of a graph at a call."""
    assert not distributed.communicates(torch.ops.aten.add.Tensor) and not distributed.communicates(torch.ops.aten.add_.Tensor)
    if not dist.is_available():
        return
    found = set[str]()

    class Watch(torch_modes.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if distributed.communicates(func):
                found.add(str(func).split(".")[1].rstrip("_"))
            return func(*args, **(kwargs or {}))

    with _group(), Watch():  # type: ignore[no-untyped-call]
        dist.all_reduce(torch.ones(2))
        dist.broadcast(torch.ones(2), 0)
        dist.all_gather([torch.ones(2)], torch.ones(2))
    assert found == {"allreduce", "broadcast", "allgather"}
