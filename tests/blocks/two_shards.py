"""One of two processes (gloo) that train under FSDP2; test_fsdp.py starts them.

python two_shards.py RANK STORE OUT: writes to OUT, for each way to shard, what the sharded and the whole module computed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import graphreg
from block_nets import Residual, Stack

KEYWORDS: dict[str, Any] = {"hidden_dropout": 0.2, "hidden_l1": 0.1, "weight_l2": 0.1, "own_dropout": "seeded", "rng": 3}


LEARNED = {"l0_gates": {"weight": 0.1, "pattern": "**.relu"}, "concrete_dropout": {"weight": 0.1, "pattern": "layers.*"}}
LEARNED |= {"example_inputs": torch.ones(4, 9, dtype=torch.double)}  # type: ignore[dict-item]


def made(**more: Any) -> Any:
    """The same on every rank. Nine features, so that two ranks have shards of different sizes."""
    torch.manual_seed(0)
    module = graphreg.regularize(Stack(3, 9).double(), **{**KEYWORDS, "blocks": "layers.*", **more})
    graphreg.set_ranks(module, "same")
    return module


def sharded(module: Any, root: bool = True, **options: Any) -> Any:
    mesh = init_device_mesh("cpu", (2,))
    for layer in module.layers:
        fully_shard(layer, mesh=mesh, **options)
    return fully_shard(module, mesh=mesh, **options) if root else module


def checkpointed(module: Any) -> Any:
    apply_activation_checkpointing(module, check_fn=lambda inner: isinstance(inner, Residual))
    return module


def compiled_blocks(module: Any) -> Any:
    for layer in module.layers:
        layer.compile(backend="aot_eager", fullgraph=True)
    return module


def train(module: Any) -> list[Any]:
    """Two steps; of each the output, the penalties and the whole gradients."""
    optimizer, steps = torch.optim.SGD(module.parameters(), 0.1), []
    x = torch.randn(4, 9, dtype=torch.double, generator=torch.Generator().manual_seed(1))
    for _ in range(2):
        optimizer.zero_grad()
        result = module(x)
        attached = not isinstance(result, graphreg.Regularized)
        output, penalties = (result, module.penalties()) if attached else result
        loss = output.square().mean()
        (loss if attached else loss + sum(penalties.values())).backward()
        gradients = [p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad.clone() for p in module.parameters()]
        steps.append([output.detach(), {name: value.detach() for name, value in penalties.items()}, gradients])
        optimizer.step()
    return steps


def flat_error(**more: Any) -> str:
    try:
        train(sharded(made(**more)))
    except graphreg.GraphRegError as error:
        return str(error)
    return ""


WAYS: dict[str, tuple[dict[str, Any], Callable[[Any], Any]]] = {
    "blocks and root": ({}, sharded),
    "blocks alone": ({}, lambda module: sharded(module, root=False)),
    "not resharded": ({}, lambda module: sharded(module, reshard_after_forward=False)),
    "checkpointed": ({}, lambda module: sharded(checkpointed(module))),
    "compiled blocks": ({}, lambda module: compiled_blocks(sharded(module))),
    "attached": ({"penalties": "attach", "scale": 1.0}, sharded),
    "learned parameters": (LEARNED, lambda module: compiled_blocks(sharded(module))),
    "learned parameters, checkpointed": (LEARNED, lambda module: sharded(checkpointed(module))),
    "whole parameters": ({"orthogonality": 0.1, "weight_l1": {"weight": 0.1, "reduction": "sum"}}, sharded),
}


def main(rank: int, store: str, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    found: dict[str, Any] = {name: (train(shard(made(**more))), train(made(**more))) for name, (more, shard) in WAYS.items()}
    found["without blocks"] = flat_error(blocks=None)
    found["contractive"] = flat_error(contractive=0.1)
    torch.save(found, out)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
