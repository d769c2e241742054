"""One of two ranks (gloo) that train the stages of a pipeline, which test_pipelines.py starts.

``main`` returns, for each way, what this rank's stages ended with.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
)

import graphreg
from stage_nets import net, stage_of

STEPS = 2
VALUES: dict[str, Any] = {"hidden_dropout": 0.2, "input_noise": 0.1, "hidden_l1": 0.3, "own_dropout": "seeded"}
ALL: dict[str, Any] = {**VALUES, "drop_connect": 0.1, "weight_l2": 0.5}


@dataclass(frozen=True)
class Way:
    """A schedule, and what it is told. ``static``: the shapes are given, so that torch does not run the stages to find them out."""

    schedule: Any
    microbatches: int = 2
    scale_grads: bool = True
    static: bool = False
    stages: int = 2
    options: dict[str, Any] = field(default_factory=lambda: ALL)


WAYS: dict[str, Way] = {
    "gpipe": Way(ScheduleGPipe),
    "gpipe, sums": Way(ScheduleGPipe, scale_grads=False, static=True),
    "1f1b": Way(Schedule1F1B, microbatches=4, scale_grads=False),
    "interleaved": Way(ScheduleInterleaved1F1B, stages=4),
    "zero bubble": Way(ScheduleInterleavedZeroBubble, stages=4, options=VALUES),
}


def data(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 4, generator=generator).double(), torch.randn(8, 3, generator=generator).double()


def loss_of(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().mean()


def like(way: Way, columns: int, is_leaf: bool) -> Tensor:
    example = torch.zeros(8 // way.microbatches, columns).double()
    return example if is_leaf else example.requires_grad_()


def stage_of_way(way: Way, index: int) -> PipelineStage:
    told = {"microbatches": way.microbatches, "scale_grads": way.scale_grads, "rng": 5}
    module = graphreg.regularize_stage(stage_of(net(0.3), index, way.stages), whole=net(0.3), **told, **way.options)  # type: ignore[arg-type]
    graphreg.set_ranks(module, "same")  # all ranks have parts of one model
    shapes: dict[str, Any] = {}
    if way.static:
        last = index == way.stages - 1
        shapes = {"input_args": (like(way, 8 if index else 4, index == 0),), "output_args": (like(way, 3 if last else 8, False),)}
    return PipelineStage(module, index, way.stages, torch.device("cpu"), **shapes)


def train(way: Way, rank: int) -> list[dict[str, Any]]:
    stages: list[Any] = [stage_of_way(way, index) for index in range(rank, way.stages, 2)]
    options: dict[str, Any] = {"n_microbatches": way.microbatches, "loss_fn": loss_of, "scale_grads": way.scale_grads}
    schedule = way.schedule(stages if way.stages > 2 else stages[0], **options)
    found = []
    for step in range(STEPS):
        for stage in stages:
            stage.submod.zero_grad()
        x, target = data(step)
        losses: list[Tensor] = []
        output = schedule.step(x) if rank == 0 else schedule.step(target=target, losses=losses)
        gradients = {name: p.grad for stage in stages for name, p in stage.submod.named_parameters()}
        penalties = [stage.submod.penalties() for stage in stages]
        states = [graphreg.rng_state(stage.submod)["call"] for stage in stages]
        found.append({"output": output, "gradients": gradients, "penalties": penalties, "calls": states})
    return found


def main(*ways: str) -> dict[str, Any]:
    """Train this rank's stages in these ways."""
    return {way: train(WAYS[way], dist.get_rank()) for way in ways}
