"""Refuses what FSDP2 (``fully_shard``) cannot do with a rewritten module, and says what can be done instead."""

from __future__ import annotations

from torch import nn

from graphreg.blocks import is_block, is_sharded
from graphreg.errors import GraphRegError
from graphreg.ir import state_of


def refuse_sharded_derivatives(module: nn.Module, names: list[str]) -> None:
    """Raise GraphRegError if penalties on derivatives act in a module that is sharded, or that has a sharded submodule."""
    if any(map(is_sharded, module.modules())):
        raise GraphRegError(
            f"{', '.join(names)} differentiates the model within its forward, and FSDP2 would free and average parameters during that. "
            "Leave this penalty out, or train without fully_shard, for instance with DistributedDataParallel."
        )


def explained(module: nn.Module, error: BaseException) -> str:
    """Return a text that explains an error about DTensor and says what to do; ``""`` if the cause is not known.

    The cause may be a sharded submodule that the graph does not call, or compiling a module whose blocks are sharded. Call this function
    only after a call has failed, because it searches all submodules, which takes long.
    """
    state = state_of(module)
    if state is None:
        return ""
    called = {str(node.target) for graph in state.graphs.values() for node in graph.nodes if node.op == "call_module"}
    for path, inner in module.named_modules():
        within = any(path == target or path.startswith(f"{target}.") for target in called)
        if path and is_sharded(inner) and not is_block(inner) and not within:
            return (
                f"fully_shard was applied to {path!r}, and the emitted code runs the operations inside that module without calling it, so "
                f"FSDP2 does not gather its parameters. Make it a block that is called: graphreg.regularize(model, ..., blocks={path!r}), "
                "with a selector of all modules that are sharded."
            )
    if type(error).__name__ == "BackendCompilerFailed" and any(is_block(inner) and is_sharded(inner) for inner in module.modules()):
        return (
            "torch.compile cannot compile the whole of a module whose blocks FSDP2 shards, because the gradients of penalties are "
            "DTensors in it. Compile the blocks instead: for block in blocks: block.compile(fullgraph=True)."
        )
    return ""
