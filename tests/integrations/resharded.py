"""Ranks (gloo) that save and load with torch.distributed.checkpoint; test_distributed_checkpoint.py starts this script.

python resharded.py FOLDER WAY...: in each way, four ranks train and save. Two ranks load that, train, save and train on; with another
module they load their own checkpoint and train on. Then four ranks load that checkpoint. FOLDER/GROUP.RANK.pt has what each rank found.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import graphreg
from block_nets import Stack
from graphreg import schedules
from graphreg.integrations.distributed_checkpoint import RegularizerState

EXAMPLE = torch.ones(2, 9)
RISING = schedules.linear(0, 0.5, 10)
KEYWORDS: dict[str, Any] = {"hidden_dropout": RISING, "weight_l2": 0.1, "own_dropout": "seeded", "blocks": "layers.*"}
LEARNED: dict[str, Any] = {"l0_gates": {"weight": 0.1, "pattern": "**.relu"}, "example_inputs": EXAMPLE}
REMEMBERING: dict[str, Any] = {"l2_sp": 0.1, "spectral": 0.1, "blocks": None}


def sharded(module: Any) -> Any:
    """Nine features, so that ranks have shards of different sizes."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in module.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(module, mesh=mesh)


def beside(seed: int, **more: Any) -> Any:
    torch.manual_seed(seed)
    return graphreg.regularize(Stack(1, 9), rng=seed, **{**KEYWORDS, **more})


def in_place(seed: int, **more: Any) -> Any:
    torch.manual_seed(seed)
    options = {**KEYWORDS, "penalties": "return", "example_inputs": EXAMPLE, **more}
    return graphreg.regularize_(Stack(1, 9), rng=seed, **options)


# by name: a module of a seed, ready to train. Each group of ranks has another seed, so that all is the checkpoint's.
WAYS: dict[str, Callable[[int], Any]] = {
    "FSDP2": lambda seed: sharded(beside(seed)),
    "FSDP2 in place": lambda seed: sharded(in_place(seed)),
    "FSDP2, learned": lambda seed: sharded(beside(seed, **LEARNED)),
    "DDP, remembering": lambda seed: DistributedDataParallel(beside(seed, **REMEMBERING)),
    "DDP in place, remembering": lambda seed: DistributedDataParallel(in_place(seed, **REMEMBERING)),
}


def whole(tensor: Any) -> Any:
    """A tensor as one rank would have it."""
    if not isinstance(tensor, Tensor):
        return tensor
    full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # type: ignore[operator]
    return full.detach().clone()


class Run:
    """A module and its optimizer."""

    def __init__(self, way: str, seed: int) -> None:
        self.module = WAYS[way](seed)
        self.optimizer = torch.optim.Adam(self.module.parameters(), 1e-2)

    def states(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.module, self.optimizer)
        return {"model": model, "optimizer": optimizer, "noise": RegularizerState(self.module)}

    def save(self, place: Path) -> None:
        dcp.save(self.states(), checkpoint_id=place)

    def load(self, place: Path) -> None:
        states = self.states()
        dcp.load(states, checkpoint_id=place)
        set_state_dict(self.module, self.optimizer, model_state_dict=states["model"], optim_state_dict=states["optimizer"])

    def found(self) -> dict[str, Any]:
        """All that a checkpoint has to bring back."""
        states = self.states()
        moments = {name: {key: whole(value) for key, value in each.items()} for name, each in states["optimizer"]["state"].items()}
        noise, strengths = graphreg.rng_state(self.module), graphreg.site_strengths(self.module)
        return {"model": {n: whole(p) for n, p in states["model"].items()}, "moments": moments, "noise": noise, "strengths": strengths}

    def step(self, step: int) -> tuple[float, dict[str, float]]:
        """The loss and the penalties of a step on this rank's batch."""
        x = torch.randn(4, 9, generator=torch.Generator().manual_seed(100 * dist.get_rank() + step))
        self.optimizer.zero_grad()
        output, penalties = self.module(x)
        loss = output.square().mean() + sum(penalties.values())
        loss.backward()
        self.optimizer.step()
        return loss.item(), {name: value.item() for name, value in penalties.items()}


def first(way: str, folder: Path) -> Any:
    """Four ranks."""
    run = Run(way, 0)
    for step in range(2):
        run.step(step)
    graphreg.set_strength(run.module, "weight_l2", {"*.up.weight": 0.3})
    run.save(folder / "first")
    return run.found(), run.step(2)


def second(way: str, folder: Path) -> Any:
    """Two ranks."""
    run = Run(way, 1)
    run.load(folder / "first")
    found, step = run.found(), run.step(2)
    run.save(folder / "second")
    whole, steps = run.found(), [run.step(step) for step in (3, 4, 5)]
    resumed = Run(way, 2)
    resumed.load(folder / "second")
    return found, step, whole, steps, resumed.found(), [resumed.step(step) for step in (3, 4, 5)]


def third(way: str, folder: Path) -> Any:
    """Four ranks."""
    run = Run(way, 3)
    run.load(folder / "second")
    return run.found(), run.step(3)


def stages(rank: int, folder: Path) -> str:
    """Two ranks with other parts of a model: each part has its key, or all have one, which is refused when it is loaded."""
    made = lambda: graphreg.regularize(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), dropout={str(rank): 0.5}, rng=rank)  # noqa: E731
    module, other = made(), made()
    module(torch.ones(1, 4))
    dcp.save({f"noise{rank}": RegularizerState(module)}, checkpoint_id=folder / "stages")
    dcp.load({f"noise{rank}": RegularizerState(other)}, checkpoint_id=folder / "stages")
    assert graphreg.rng_state(other) == graphreg.rng_state(module) and graphreg.rng_state(other)["call"] == 1
    dcp.save({"noise": RegularizerState(module)}, checkpoint_id=folder / "mixed")
    try:
        dcp.load({"noise": RegularizerState(other)}, checkpoint_id=folder / "mixed")
    except graphreg.RegularizerError as error:
        return str(error)
    return ""


def group(ranks: int, what: Callable[[int], Any], place: str) -> None:
    """Fork ranks, and write to PLACE.RANK.pt what each returns."""
    children = [child for rank in range(ranks) if (child := _forked(rank, ranks, what, place))]
    statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    if any(statuses):
        sys.exit(f"{place}: a rank failed")


def _forked(rank: int, ranks: int, what: Callable[[int], Any], place: str) -> int:
    if child := os.fork():
        return child
    try:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"file://{place}.store", rank=rank, world_size=ranks)
        torch.save(what(rank), f"{place}.{rank}.pt")
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def main(folder: Path, *ways: str) -> None:
    for name, ranks, found_by in (("first", 4, first), ("second", 2, second), ("third", 4, third)):
        group(ranks, lambda rank, found_by=found_by: {way: found_by(way, folder / way) for way in ways}, str(folder / name))
    group(2, lambda rank: stages(rank, folder), str(folder / "stages"))


if __name__ == "__main__":  # nothing has run yet: all ranks have the one import
    main(Path(sys.argv[1]), *sys.argv[2:])
