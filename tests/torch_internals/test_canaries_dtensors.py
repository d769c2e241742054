"""Canaries of DTensors, of FSDP2, and of torch's tensor parallelism. They make a process group of this one process."""

from __future__ import annotations

import gc
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

from graphreg.torch_internals import distributed, tensor_parallel


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


def test_tensors() -> None:
    """How a DTensor is made, read and reduced. It concerns penalties on DTensors."""
    with alone() as mesh:
        whole = torch.arange(6.0).view(3, 2)
        sharded: Any = distribute_tensor(whole, mesh, [Shard(0)])
        assert (
            distributed.has_process_group()
            and distributed.world_size() == 1
            and distributed.is_distributed(sharded)
            and not distributed.is_distributed(whole)
        )
        assert distributed.is_distributed(nn.Parameter(sharded)) and distributed.shards(sharded) == [(0, 1)]
        assert torch.compile(distributed.is_distributed, backend="eager", fullgraph=True)(sharded)
        copied = distributed.replicated(whole, sharded)
        assert copied.placements == (Replicate(),) and distributed.shards(copied) == [] and torch.equal(copied.full_tensor(), whole)
        summed = DTensor.from_local(whole, mesh, [Partial()], run_check=False)
        assert distributed.shards(summed) is None and distributed.without_partial_sums(summed).placements == (Replicate(),)
        assert distributed.without_partial_sums(sharded) is sharded
        assert distributed.on_all_ranks(True, sharded) and not distributed.on_all_ranks(False, sharded)


def test_fsdp() -> None:
    """How FSDP2 keeps the parameters that it shards. It concerns penalties on parameters under FSDP2."""
    with alone() as mesh:
        seen = list[tuple[Tensor, bool]]()

        class Layer(nn.Linear):
            def forward(self, x: Tensor) -> Tensor:
                seen.append((self.weight, distributed.taken_by_fsdp(self.weight)))
                return super().forward(x)

        layer = Layer(2, 2)
        torch._dynamo.reset()  # compiled code of earlier tests keeps the modules that these have sharded
        gc.collect()
        assert not distributed.uses_fsdp() and not distributed.taken_by_fsdp(layer.weight)
        fully_shard(layer, mesh=mesh)
        assert type(layer).__name__ == "FSDPLayer" and distributed.class_name(layer) == distributed.class_name(Layer(1, 1)) == "Layer"
        own = layer.weight
        layer(torch.ones(1, 2))
        gathered, was_taken = seen[0]
        assert (
            distributed.uses_fsdp() and not distributed.is_distributed(gathered) and distributed.sharded_parameters()[id(gathered)] is own
        )
        assert not was_taken and distributed.taken_by_fsdp(own) and distributed.taken_by_fsdp(gathered)
        function = torch.compile(lambda weight: (distributed.taken_by_fsdp(weight), weight * 2), backend="eager", fullgraph=True)
        assert function(own)[0] and not function(torch.ones(2))[0]


def test_parallel() -> None:
    """How parallelize_module converts what a layer takes and returns. It concerns penalties under tensor parallelism."""
    with alone() as mesh:

        def returns(style: Any, layer: nn.Module) -> bool | None:
            assert not tensor_parallel.has_parallel_hooks(layer) and tensor_parallel.returns_shard(layer) is None
            styles.parallelize_module(layer, mesh, style)
            assert tensor_parallel.has_parallel_hooks(layer)
            return tensor_parallel.returns_shard(layer)

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
        assert returns(entry, layer) is None and tensor_parallel.shards_passed(layer) == ((True, False, False), frozenset())
        assert tensor_parallel.shards_passed(nn.Identity()) == ((), frozenset())


def test_layouts() -> None:
    """How a parallel layer keeps its style in its hooks. It concerns set_ranks, which infers how tensor-parallel ranks share values."""
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
    local = [tensor_parallel.Layout((placement,), is_local=True) for placement in (Shard(-1), Shard(1), Shard(1))]
    assert [tensor_parallel.output_layout(layer) for layer in layers] == [
        *local, tensor_parallel.Layout((Shard(-1),), is_local=False), None, tensor_parallel.Layout((Replicate(),), is_local=True),
        tensor_parallel.Layout((), is_local=True), None,
    ]  # fmt: skip
    assert [tensor_parallel.input_layout(layer) for layer in layers[4:]] == [
        tensor_parallel.Layout((None, Replicate()), is_local=False),
        None,
        None,
        None,
    ]
    assert [tensor_parallel.has_parallel_hooks(layer) for layer in layers] == [True] * 7 + [False]
