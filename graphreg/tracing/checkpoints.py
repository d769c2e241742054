"""Activation checkpointing in a model: which modules checkpoint their own forward, and what both front ends say of all others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from graphreg.torch_internals import Changes

CHECKPOINTS = "it checkpoints activations, which a trace would lose"  # the reason that both front ends give
_LAYER = "GradientCheckpointingLayer"  # the class of transformers whose subclasses checkpoint their own forward
_FUNCTION = "_gradient_checkpointing_func"  # the attribute with the function that such a layer checkpoints with


def checkpoints_itself(module: nn.Module) -> bool:
    """Return whether each call of a module in train mode checkpoints the module's whole forward, as layers of transformers do.

    Their class wraps the forward of each subclass, also of those that graphreg makes. So a block with such a class checkpoints the emitted
    code as the model's module does the forward.
    """
    return getattr(module, "gradient_checkpointing", False) is True and any(kind.__name__ == _LAYER for kind in type(module).__mro__)


def see_through_checkpoints(model: nn.Module, changes: Changes) -> None:
    """Until the changes end, have modules that checkpoint their own forward run it without a checkpoint, so that a trace has its values.

    The modules become blocks, so no checkpoint is lost. Only the function is replaced, because the flag also decides on caches.
    """
    for module in model.modules():
        if checkpoints_itself(module):
            changes.put(vars(module), _FUNCTION, _run)


def _run(forward: Callable[..., Any], *args: Any) -> Any:
    return forward(*args)
