"""One of two ranks (gloo) that train under FSDP2, which test_fsdp.py starts.

``main`` returns, for each way to shard, what the sharded module computed, and in the first rank what the whole module computed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import graphreg
from block_nets import Residual, Stack, rewritten

INPUTS = torch.randn(4, 9, dtype=torch.double, generator=torch.Generator().manual_seed(1))
KEYWORDS: dict[str, Any] = {"hidden_dropout": 0.2, "hidden_l1": 0.1, "weight_l2": 0.1, "own_dropout": "seeded", "rng": 3}


LEARNED = {"l0_gates": {"weight": 0.1, "pattern": "**.relu"}, "concrete_dropout": {"weight": 0.1, "pattern": "layers.*"}}
LEARNED |= {"example_inputs": torch.ones(4, 9, dtype=torch.double)}  # type: ignore[dict-item]


TRACED = graphreg.trace(Stack(3, 9).double(), INPUTS)  # once, before the ranks are forked


def made(**more: Any) -> Any:
    """The same on every rank. Nine features, so that two ranks have shards of different sizes."""
    torch.manual_seed(0)
    options = {**KEYWORDS, "blocks": "layers.*", **more}
    options.pop("example_inputs", None)  # the trace has some
    module = rewritten(TRACED, Stack(3, 9).double(), **options)
    graphreg.set_ranks(module, "same")
    return module


def placed(**more: Any) -> Any:
    """The same in place. It is traced before it is sharded."""
    torch.manual_seed(0)
    model = Stack(3, 9).double()
    graphreg.regularize_(model, **{**KEYWORDS, "blocks": "layers.*", "penalties": "return", "example_inputs": INPUTS, **more})
    graphreg.set_ranks(model, "same")
    return model


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
    for _ in range(2):
        optimizer.zero_grad()
        result = module(INPUTS)
        attached = not isinstance(result, (graphreg.Regularized, graphreg.Kept))
        output, penalties = (result, module.penalties()) if attached else result[:2]
        loss = output.square().mean()
        if isinstance(result, graphreg.Kept):
            loss = loss + sum(value.square().mean() for value in result.values.values())
        (loss if attached else loss + sum(penalties.values())).backward()
        gradients = [p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad.clone() for p in module.parameters()]
        steps.append([output.detach(), {name: value.detach() for name, value in penalties.items()}, gradients])
        optimizer.step()
        if not PROX.keys().isdisjoint(graphreg.strengths(module)):
            graphreg.prox_(module, optimizer)
    return steps


def error_of(run: Callable[[], Any]) -> str:
    try:
        run()
    except graphreg.GraphRegError as error:
        return str(error)
    return ""


ATTACHED: dict[str, Any] = {"penalties": "attach", "scale": 1.0}
PROX: dict[str, Any] = {"group_lasso": {"weight": 0.1, "axis": 1, "by": "prox"}}
KEPT: dict[str, Any] = {"keep": {"layers.*": "clean", "layers.1.relu": "spliced"}}  # a block's output, and a value inside a block
WHOLE: dict[str, Any] = {"orthogonality": 0.1, "weight_l1": {"weight": 0.1, "reduction": "sum"}} | PROX
# by name: further options, and the sharded module
WAYS: dict[str, tuple[dict[str, Any], Callable[..., Any]]] = {
    "blocks and root": ({}, lambda **more: sharded(made(**more))),
    "blocks alone": ({}, lambda **more: sharded(made(**more), root=False)),
    "not resharded": ({}, lambda **more: sharded(made(**more), reshard_after_forward=False)),
    "checkpointed": ({}, lambda **more: sharded(checkpointed(made(**more)))),
    "compiled blocks": ({}, lambda **more: compiled_blocks(sharded(made(**more)))),
    "attached": (ATTACHED, lambda **more: sharded(made(**more))),
    "learned parameters": (LEARNED, lambda **more: compiled_blocks(sharded(made(**more)))),
    "learned parameters, checkpointed": (LEARNED, lambda **more: sharded(checkpointed(made(**more)))),
    "learned parameters, root alone": (LEARNED, lambda **more: fully_shard(made(**more, blocks=None), mesh=init_device_mesh("cpu", (2,)))),
    "learned parameters, DistributedDataParallel": (LEARNED, lambda **more: DistributedDataParallel(made(**more))),
    "kept values": (KEPT, lambda **more: sharded(made(**more))),
    "kept values, checkpointed": (KEPT, lambda **more: sharded(checkpointed(made(**more)))),
    "kept values, DistributedDataParallel": (KEPT, lambda **more: DistributedDataParallel(made(**more))),
    "whole parameters": (WHOLE, lambda **more: sharded(made(**more))),
    "in place": ({}, lambda **more: sharded(placed(**more))),
    "in place, checkpointed": ({}, lambda **more: sharded(checkpointed(placed(**more)))),
    "in place, compiled blocks": ({}, lambda **more: compiled_blocks(sharded(placed(**more)))),
    "in place, attached": (ATTACHED, lambda **more: sharded(placed(**more))),
}


made(), torch.optim.SGD([torch.nn.Parameter(torch.ones(()))], 0.1)  # imports what ranks need, before they are forked


def main(*ways: str) -> dict[str, Any]:
    """Train in these ways, and the first rank whole as well; ``errors``: find the errors, too."""
    asked = {name: WAYS[name] for name in ways if name in WAYS}
    found: dict[str, Any] = {name: train(shard(**more)) for name, (more, shard) in asked.items()}
    if dist.get_rank() == 0:
        whole = {text: train(made(**more)) for text, more in {str(more): more for more, _ in asked.values()}.items()}
        found["whole"] = {name: whole[str(more)] for name, (more, _) in asked.items()}
    return found | (errors() if "errors" in ways else {})


def errors() -> dict[str, str]:
    found = {}
    found["without blocks"] = error_of(lambda: train(sharded(made(blocks=None))))
    found["without blocks in place"] = error_of(lambda: train(sharded(placed(blocks=None))))
    found["contractive"] = error_of(lambda: train(sharded(made(contractive=0.1))))
    found["contractive in place"] = error_of(lambda: train(sharded(placed(contractive=0.1))))
    found["traced when sharded"] = error_of(lambda: sharded(placed(example_inputs=None))(INPUTS))
    found["stripped when sharded"] = error_of(lambda: graphreg.strip_(sharded(placed(), root=False)))
    return found
