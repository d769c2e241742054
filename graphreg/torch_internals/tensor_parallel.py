"""Finds out how a parallel layer of ``torch.distributed.tensor.parallel`` shares its output among ranks."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn


def output_layout(module: nn.Module) -> tuple[Any, bool] | None:
    """Return the placement of a parallel layer's output, and whether the output is a plain tensor, not a DTensor.

    Return None for a layer that no ``ParallelStyle`` of torch made parallel, or whose style is unknown.

    The placement is an argument of the style, such as ``ColwiseParallel(output_layouts=...)``. torch keeps this argument only in the
    closure of a lambda that ``distribute_module`` registers on the layer: as a forward hook, or for ``SequenceParallel`` as a forward
    pre-hook.
    """
    after, before = _bound(module._forward_hooks, "output_fn"), _bound(module._forward_pre_hooks, "input_fn")
    if not after:
        return None
    placements = [value for value in (*after, *before) if isinstance(value, tuple) and value and all(map(_is_placement, value))]
    is_local = [value for value in after if isinstance(value, bool)]
    if not placements or len(placements[0]) != 1 or len(is_local) != 1:
        return None
    return placements[0][0], is_local[0]


def is_distributed(module: nn.Module) -> bool:
    """Return whether ``distribute_module`` or a style such as ``PrepareModuleInput`` has registered a hook on the module."""
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return any(getattr(hook, "__module__", "").startswith("torch.distributed.tensor") for hook in hooks)


def _bound(hooks: Any, name: str) -> tuple[Any, ...]:
    """Return the arguments of the ``partial`` that a hook of torch's has in its closure under ``name``; () if there is none."""
    for hook in hooks.values():
        code = getattr(hook, "__code__", None)
        if code is None or not hook.__module__.startswith("torch.distributed.tensor") or name not in code.co_freevars:
            continue
        function = hook.__closure__[code.co_freevars.index(name)].cell_contents
        if isinstance(function, partial):
            return function.args
    return ()


def _is_placement(value: object) -> bool:
    return all(hasattr(value, name) for name in ("is_shard", "is_replicate", "is_partial"))
