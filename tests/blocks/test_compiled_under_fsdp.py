"""Blocks that are compiled one by one, then sharded by FSDP2: Dynamo sees none of FSDP2's hooks, and the user's hooks see each call."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

import graphreg
from block_nets import Stack


@pytest.fixture
def mesh(monkeypatch: pytest.MonkeyPatch) -> Iterator[DeviceMesh]:
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # init_process_group replaces it
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo asks for it, and hides the warning
@pytest.mark.parametrize("hooked", [False, True])
def test_each_block_is_one_graph(mesh: DeviceMesh, hooked: bool) -> None:
    def regularized() -> graphreg.RewrittenModule:
        torch.manual_seed(0)
        return graphreg.regularize(Stack(2), hidden_dropout=0.2, weight_l2=1e-2, blocks="layers.*", rng=0)

    def step(module: graphreg.RewrittenModule) -> list[Tensor]:
        output, penalties = module(torch.ones(3, 8))
        (output.square().mean() + penalties["weight_l2"]).backward()
        return [output, *(parameter.grad for parameter in module.parameters())]

    graphs = list[torch.fx.GraphModule]()

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    module, shapes = regularized(), list[torch.Size]()
    for block in module.layers:
        if hooked:
            block.register_forward_hook(lambda block, given, output: shapes.append(output.shape))
        block.compile(backend=backend, fullgraph=True)
        fully_shard(block, mesh=mesh)
    fully_shard(module, mesh=mesh)
    sharded = step(module)
    plain = step(regularized())
    for one, other in zip(sharded, plain, strict=True):
        torch.testing.assert_close(one.full_tensor() if isinstance(one, dist.tensor.DTensor) else one, other)
    assert graphs and len(graphs) <= 2 and shapes == [torch.Size([3, 8])] * 2 * hooked
