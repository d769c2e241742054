"""Canaries of DTensors, of FSDP2, and of torch's tensor parallelism. They make a process group of this one process.

In each ``@canary``, the first text completes "torch changed how …", the second "this concerns …"; then come the tested names.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor import parallel as styles

import graphreg.torch_internals as door
from graphreg.torch_internals.canaries.canary import canary


@contextmanager
def alone() -> Iterator[Any]:
    """Open a block with a mesh that has this process alone."""
    made, hook = not dist.is_initialized(), sys.excepthook  # init_process_group replaces the hook
    if made:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    try:
        yield DeviceMesh("cpu", [dist.get_rank()])
    finally:
        if made:
            dist.destroy_process_group()
            sys.excepthook = hook


@canary("a DTensor is made, read and reduced", "penalties on DTensors", "has_process_group", "is_distributed", "on_all_ranks", "replicated",
        "shards", "without_partial_sums", "world_size")  # fmt: skip
def tensors() -> None:
    with alone() as mesh:
        whole = torch.arange(6.0).view(3, 2)
        sharded: Any = distribute_tensor(whole, mesh, [Shard(0)])
        assert door.has_process_group() and door.world_size() == 1 and door.is_distributed(sharded) and not door.is_distributed(whole)
        assert door.is_distributed(nn.Parameter(sharded)) and door.shards(sharded) == [(0, 1)]
        assert torch.compile(door.is_distributed, backend="eager", fullgraph=True)(sharded)
        copied = door.replicated(whole, sharded)
        assert copied.placements == (Replicate(),) and door.shards(copied) == [] and torch.equal(copied.full_tensor(), whole)
        summed = DTensor.from_local(whole, mesh, [Partial()], run_check=False)
        assert door.shards(summed) is None and door.without_partial_sums(summed).placements == (Replicate(),)
        assert door.without_partial_sums(sharded) is sharded
        assert door.on_all_ranks(True, sharded) and not door.on_all_ranks(False, sharded)


@canary("FSDP2 keeps the parameters that it shards", "penalties on parameters under FSDP2", "sharded_parameters",
        "taken_by_fsdp", "uses_fsdp")  # fmt: skip
def fsdp() -> None:
    with alone() as mesh:
        seen = list[tuple[Tensor, bool]]()

        class Layer(nn.Linear):
            def forward(self, x: Tensor) -> Tensor:
                seen.append((self.weight, door.taken_by_fsdp(self.weight)))
                return super().forward(x)

        layer = Layer(2, 2)
        assert not door.uses_fsdp() and not door.taken_by_fsdp(layer.weight)
        fully_shard(layer, mesh=mesh)
        own = layer.weight
        layer(torch.ones(1, 2))
        gathered, was_taken = seen[0]
        assert door.uses_fsdp() and not door.is_distributed(gathered) and door.sharded_parameters()[id(gathered)] is own
        assert not was_taken and door.taken_by_fsdp(own) and door.taken_by_fsdp(gathered)
        function = torch.compile(lambda weight: (door.taken_by_fsdp(weight), weight * 2), backend="eager", fullgraph=True)
        assert function(own)[0] and not function(torch.ones(2))[0]


@canary("parallelize_module converts what a layer takes and returns", "penalties under tensor parallelism", "has_parallel_hooks",
        "returns_shard", "shards_passed")  # fmt: skip
def parallel() -> None:
    with alone() as mesh:
        def returns(style: Any, layer: nn.Module) -> bool | None:
            assert not door.has_parallel_hooks(layer) and door.returns_shard(layer) is None
            styles.parallelize_module(layer, mesh, style)
            assert door.has_parallel_hooks(layer)
            return door.returns_shard(layer)

        assert returns(styles.ColwiseParallel(), nn.Linear(2, 2)) is True
        assert returns(styles.ColwiseParallel(use_local_output=False), nn.Linear(2, 2)) is False
        assert returns(styles.ColwiseParallel(output_layouts=Replicate()), nn.Linear(2, 2)) is False
        assert returns(styles.RowwiseParallel(), nn.Linear(2, 2)) is False
        assert returns(styles.RowwiseParallel(output_layouts=Shard(1)), nn.Embedding(2, 2)) is True
        assert returns(styles.SequenceParallel(), nn.LayerNorm(2)) is False
        assert returns(styles.SequenceParallel(use_local_output=True), nn.LayerNorm(2)) is True
        cut: dict[str, Any] = {"output_layouts": Replicate(), "desired_output_layouts": Shard(0)}
        assert returns(styles.PrepareModuleOutput(**cut), nn.Identity()) is True
        layer = nn.Identity()
        moved = (Shard(1), None, Replicate())
        entry = styles.PrepareModuleInput(input_layouts=moved, desired_input_layouts=moved, use_local_output=True)
        assert returns(entry, layer) is None and door.shards_passed(layer) == ((True, False, False), frozenset())
        assert door.shards_passed(nn.Identity()) == ((), frozenset())


@canary("a parallel layer keeps its style in its hooks", "set_ranks, which infers how tensor-parallel ranks share values", "Layout",
        "input_layout", "output_layout")  # fmt: skip
def layouts() -> None:
    given: dict[str, Any] = {
        "0": styles.ColwiseParallel(),
        "1": styles.RowwiseParallel(output_layouts=Shard(1)),
        "2": styles.SequenceParallel(use_local_output=True),
        "3": styles.ColwiseParallel(use_local_output=False),
        "4": styles.PrepareModuleInput(input_layouts=(None, Shard(0)), desired_input_layouts=(None, Replicate())),
        "5": styles.PrepareModuleOutput(output_layouts=Shard(0), desired_output_layouts=Replicate()),
    }
    layers: list[nn.Module] = [nn.Linear(2, 2), nn.Linear(2, 2), nn.LayerNorm(2), nn.Linear(2, 2), *(nn.Identity() for _ in range(4))]
    with alone() as mesh:
        styles.parallelize_module(nn.Sequential(*layers), mesh, given)
        distribute_module(layers[6], mesh, output_fn=lambda module, result, mesh: result)  # a style that torch does not have
    local = [door.Layout((placement,), is_local=True) for placement in (Shard(-1), Shard(1), Shard(1))]
    assert [door.output_layout(layer) for layer in layers] == [
        *local, door.Layout((Shard(-1),), is_local=False), None, door.Layout((Replicate(),), is_local=True),
        door.Layout((), is_local=True), None,
    ]  # fmt: skip
    assert [door.input_layout(layer) for layer in layers[4:]] == [door.Layout((None, Replicate()), is_local=False), None, None, None]
    assert [door.has_parallel_hooks(layer) for layer in layers] == [True] * 7 + [False]
