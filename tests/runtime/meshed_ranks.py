"""One rank of a mesh of data and tensor ranks (gloo), which test_mesh_ranks.py starts.

``main`` returns, by way, the losses and gradients of three steps, on the mesh and in one process.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import graphreg

BATCH = torch.randn(8, 3, 8, dtype=torch.double, generator=torch.Generator().manual_seed(1))
WAYS = (
    "plain", "DTensor", "compiled", "compiled DTensor", "native", "in place", "weights", "without set_ranks",
    "compiled without set_ranks", "sharded", "exported", "exported without set_ranks", "backend without set_ranks",
)  # fmt: skip


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.drop = nn.Linear(8, 16), nn.Linear(16, 8), nn.Dropout(0.25)
        self.norm, self.out = nn.LayerNorm(8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(x + self.down(self.drop(torch.tanh(self.up(x))))))


def plain() -> nn.Module:
    torch.manual_seed(0)
    return Net().double()


def regularized(way: str) -> Any:
    """The same on every rank, and on one process for the whole batch."""
    options: dict[str, Any] = {"dropout": {"pattern": ["down", "add"], "weight": 0.3}, "rng": 7}
    if "exported" in way:
        options |= {"front_end": "export", "example_inputs": BATCH}
    if "without set_ranks" in way:
        del options["dropout"]
        return graphreg.regularize(plain(), gaussian_dropout={"pattern": "tanh", "weight": 0.2}, own_dropout="off", **options)
    if way == "weights":
        options |= {"drop_connect": {"pattern": "out.weight", "weight": 0.4}}
    else:
        options |= {"noise": {"pattern": "tanh", "weight": 0.2}}
    options["own_dropout"] = "seeded" if way == "native" else "off"
    if way == "in place":
        return graphreg.regularize_(plain(), example_inputs=BATCH, **options)
    return graphreg.regularize(plain(), **options)


def parallel(module: Any, mesh: DeviceMesh, way: str) -> None:
    local = "DTensor" not in way and "without set_ranks" not in way
    styles = {
        "up": ColwiseParallel(use_local_output=local),
        "down": RowwiseParallel(),
        "out": ColwiseParallel(output_layouts=Replicate()),
    }
    if way == "weights":
        del styles["out"]
    parallelize_module(module, mesh["tp"], styles)
    if way == "sharded":
        fully_shard(module, mesh=mesh["dp"])


def steps(module: Any, run: Any, x: Tensor, mesh: DeviceMesh | None = None) -> list[tuple[Tensor, ...]]:
    """Of three steps the loss and the gradients, averaged over the ranks that have other examples."""
    found = []
    for _ in range(3):
        module.zero_grad()
        result = run(x)
        loss = (result if isinstance(result, Tensor) else result.output).square().mean()
        loss.backward()
        told = [loss.detach().clone(), *(whole(p.grad).clone() for p in module.parameters())]
        if mesh is not None:
            for each in told:
                dist.all_reduce(each, group=mesh["dp"].get_group())
                each.div_(mesh["dp"].size())
        found.append(tuple(told))
    return found


def whole(gradient: Any) -> Tensor:
    tensor: Tensor = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
    return tensor


def ran(way: str, mesh: DeviceMesh) -> tuple[Any, Any]:
    """What the ranks of the mesh find, and what one process with the whole batch finds."""
    alone, module = regularized(way), plain() if "backend" in way else regularized(way)
    parallel(module, mesh, way)
    x = BATCH
    if "without set_ranks" not in way:
        graphreg.set_ranks(module, mesh=mesh, data="dp", tensor="tp", one_batch=True)
        x = BATCH.chunk(mesh["dp"].size())[mesh.get_local_rank("dp")]
    run = torch.compile(module, backend="aot_eager", fullgraph=True) if "compiled" in way else module
    if "backend" in way:
        backend = graphreg.backend(
            gaussian_dropout={"pattern": "tanh", "weight": 0.2}, own_dropout="off", rng=7, inner="aot_eager"
        )  # fmt: skip
        run = torch.compile(module, backend=backend, fullgraph=True)
    found = steps(module, run, x, mesh)
    graphreg.set_ranks(alone, "same")  # as one process without ranks
    return found, steps(alone, alone, BATCH)


def main(*ways: str) -> dict[str, Any]:
    """Compute in these ways. ``"2: plain"``: in the way "plain" on a mesh in which two ranks have different examples.

    The other dimension of the mesh is that of tensors.
    """
    found = {}
    for asked in ways:
        data, _, way = asked.partition(": ")
        mesh = init_device_mesh("cpu", (int(data), dist.get_world_size() // int(data)), mesh_dim_names=("dp", "tp"))
        found[asked] = ran(way, mesh)
    return found
