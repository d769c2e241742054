"""torch's activation checkpointing: a function to call before each checkpoint, and ids for the regions of a graph that are recomputed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.utils.checkpoint as checkpointing
from torch import nn
from torch._higher_order_ops.wrap import uid

from graphreg.torch_internals.patching import Changes

WRAPPED_MODULE = "_checkpoint_wrapped_module"  # the attribute of a wrapper that ``checkpoint_wrapper`` made


def before_checkpoints(changes: Changes, ask: Callable[[], None]) -> None:
    """Until the changes end, call ``ask`` before each activation checkpoint; if ``ask`` raises, the checkpoint raises.

    A trace would run the checkpointed function once and silently lose the checkpoint, so the front ends raise in ``ask``. torch has no hook
    for this, so the functions that begin a checkpoint are replaced, for all threads.
    """

    def preceded(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            ask()
            return original(*args, **kwargs)

        return call

    for name, original in begins().items():
        changes.put(checkpointing, name, preceded(original))
    function = checkpointing.CheckpointFunction
    changes.put(function, "apply", preceded(function.apply))


def begins() -> dict[str, Any]:
    """Return, by name, torch's functions that begin a non-reentrant checkpoint: one up to torch 2.14, two from 2.15 on."""
    return {name: value for name, value in vars(checkpointing).items() if name.startswith("_checkpoint_without_reentrant_generator")}


def checkpoint_wrapped(module: nn.Module) -> nn.Module | None:
    """Return the module inside a wrapper that ``checkpoint_wrapper`` made; None for any other module."""
    return module._modules.get(WRAPPED_MODULE)


def next_region() -> int:
    """Return a new id for a region that is recomputed in backward. torch takes the ids of checkpoints from the same counter."""
    return next(uid)
