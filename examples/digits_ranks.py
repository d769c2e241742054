"""One rank of the run that demo_ranks.py kills and resumes: a small transformer on scikit-learn's digits, sharded by FSDP2."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from sklearn.datasets import load_digits  # type: ignore[import-untyped]
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import graphreg
from graphreg import schedules
from graphreg.integrations.distributed_checkpoint import RegularizerState

RANKS, TEST = 2, 400
TOKENS, PIXELS, HEADS = 16, 4, 4  # an image of 8 x 8 is 16 squares of 2 x 2


@dataclass(frozen=True)
class Setup:
    """The size of the run.

    Attributes:
        steps: The number of training steps, a multiple of ``every``.
        every: A checkpoint is saved each time so many steps are done.
        width: The width of the transformer.
        depth: The number of its blocks.
        batch: The number of images that a rank trains on in a step.
        backend: The backend of torch.compile that compiles each block; ``""`` to compile nothing.
    """

    steps: int = 100
    every: int = 20
    width: int = 32
    depth: int = 3
    batch: int = 64
    backend: str = "inductor"


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.projection = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.projection(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.embedding, self.places = nn.Linear(PIXELS, width), nn.Parameter(torch.zeros(TOKENS, width))
        self.blocks, self.head = nn.ModuleList(Block(width) for _ in range(depth)), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x) + self.places
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


def digits() -> tuple[Tensor, Tensor]:
    """Images as tokens [1797, 16, 4] in [0, 1] and labels [1797], shuffled once and for all. The first TEST of them are for the test."""
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    squares = torch.tensor(data.data, dtype=torch.float32).view(-1, 4, 2, 4, 2).transpose(2, 3).reshape(-1, TOKENS, PIXELS)
    return squares[order] / 16, torch.tensor(data.target)[order]


class Training:
    """The regularized model and its optimizer on one rank."""

    def __init__(self, setup: Setup, folder: Path, rank: int) -> None:
        self.setup, self.folder, self.rank = setup, folder, rank
        self.images, self.labels = digits()
        torch.manual_seed(0)  # the same weights on both ranks, before they are sharded
        self.module = graphreg.regularize(
            Transformer(setup.width, setup.depth),
            hidden_dropout=schedules.linear(0.0, 0.1, setup.steps),
            weight_l2={"strength": 1e-4, "reduction": "sum"},
            rng=0,
            blocks="blocks.*",
        )
        mesh = init_device_mesh("cpu", (RANKS,))
        for block in self.module.blocks:
            if setup.backend:
                block.compile(backend=setup.backend, fullgraph=True)
            fully_shard(block, mesh=mesh)
        fully_shard(self.module, mesh=mesh)
        self.optimizer = torch.optim.AdamW(self.module.parameters(), 1e-2)

    def states(self) -> dict[str, Any]:
        """What a checkpoint has."""
        model, optimizer = get_state_dict(self.module, self.optimizer)
        return {"model": model, "optimizer": optimizer, "noise": RegularizerState(self.module)}

    def save(self, step: int) -> None:
        dcp.save(self.states(), checkpoint_id=self.folder / f"step{step}")

    def load(self, step: int, noise: bool) -> None:
        """Load the checkpoint after so many steps; with ``noise`` false all of it but the state of the regularizers."""
        states = self.states()
        if not noise:
            del states["noise"]
        dcp.load(states, checkpoint_id=self.folder / f"step{step}")
        set_state_dict(self.module, self.optimizer, model_state_dict=states["model"], optim_state_dict=states["optimizer"])

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """This rank's share of the images of a step."""
        size = self.setup.batch
        order = torch.randperm(len(self.labels) - TEST, generator=torch.Generator().manual_seed(step))
        rows = TEST + order[self.rank * size : (self.rank + 1) * size]
        return self.images[rows], self.labels[rows]

    def run(self, start: int, stop: int, halt: int = -1) -> Iterator[float]:
        """Train from step ``start``, and yield each loss. In the middle of step ``halt``, rank 1 stands still until it is killed."""
        for step in range(start, stop):
            x, y = self.batch(step)
            output, penalties = self.module(x)
            loss = F.cross_entropy(output, y) + penalties["weight_l2"]
            self.optimizer.zero_grad()
            loss.backward()
            if step == halt and self.rank == 1:
                (self.folder / "halted").touch()
                time.sleep(600)
            self.optimizer.step()
            if step == stop // 3:
                graphreg.set_strength(self.module, "weight_l2", 2e-4)
            yield loss.item()
            if (step + 1) % self.setup.every == 0:
                self.save(step + 1)


def plain(folder: Path, setup: Setup) -> Transformer:
    """The model alone, on this one process, with the weights of the last checkpoint of a whole run."""
    model = Transformer(setup.width, setup.depth)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
        dcp.load({"model": model.state_dict()}, checkpoint_id=folder / f"step{setup.steps}")  # into the model's own tensors
    return model.eval()


def accuracy(model: Transformer) -> float:
    """On the test images, in per cent."""
    images, labels = digits()
    with torch.no_grad():
        return 100 * (model(images[:TEST]).argmax(1) == labels[:TEST]).float().mean().item()


def checkpoints(folder: Path) -> list[int]:
    """The steps after which a whole checkpoint was saved: DCP writes .metadata last."""
    return sorted(int(path.parent.name.removeprefix("step")) for path in folder.glob("step*/.metadata"))


def main(folder: Path, rank: int, port: int, setup: Setup, halt: int, control: bool) -> None:
    """Train from the last checkpoint, or from the beginning, and write each loss to a file. This is all that a process does.

    Args:
        folder: Where checkpoints, losses and the log of this process are.
        rank: The rank of this process.
        port: A port by which the processes find each other.
        setup: The size of the run.
        halt: In the middle of which step rank 1 stands still; -1 for none.
        control: Whether to resume without the state of the regularizers, only up to the next checkpoint, and to save nothing.
    """
    log = os.open(folder / f"log.{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=RANKS)
    training = Training(setup, folder, rank)
    start = max(checkpoints(folder), default=0)
    if start:
        training.load(start, noise=not control)
    stop = min(start + setup.every - 1, setup.steps) if control else setup.steps
    with (folder / f"{'control' if control else 'losses'}.{rank}").open("a", buffering=1) as file:
        for step, loss in enumerate(training.run(start, stop, halt), start):
            file.write(f"{step} {loss.hex()}\n")
    dist.barrier()
    dist.destroy_process_group()
