"""torch's activation checkpointing: where it begins, and the numbers that Dynamo gives its regions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.utils.checkpoint as checkpointing
from torch._higher_order_ops.wrap import uid

from graphreg.torch_internals.patching import Changes


def before_checkpoints(changes: Changes, ask: Callable[[], None]) -> None:
    """Until the changes end: have ``ask`` called before any code checkpoints activations; what it raises goes to that code.

    A trace runs the function once, and checkpointing is lost, without a word. torch has no hook for it, so its functions that begin a
    checkpoint are wrapped, of every thread's code.
    """

    def asked(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            ask()
            return original(*args, **kwargs)

        return call

    for name, original in begins().items():
        changes.put(checkpointing, name, asked(original))
    function = checkpointing.CheckpointFunction
    changes.put(function, "apply", asked(function.apply))


def begins() -> dict[str, Any]:
    """What begins a checkpoint that is not reentrant, by name: one function up to torch 2.14, from 2.15 on another behind it."""
    return {name: value for name, value in vars(checkpointing).items() if name.startswith("_checkpoint_without_reentrant_generator")}


def next_region() -> int:
    """A number for a region that is recomputed, unlike those that Dynamo gives to checkpoints."""
    return next(uid)
