"""Activation checkpointing in a model: finds modules that checkpoint their own forward, and lets a trace see the values in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from graphreg.torch_internals.patching import Changes

# the reason why both front ends make such a module opaque
CHECKPOINTS = "it checkpoints activations, which a trace would lose"
CURE = (
    "if the model checkpoints its blocks, turn that off (timm: model.set_grad_checkpointing(False)), name the blocks in blocks=, and put "
    "checkpoint_wrapper around the blocks of the result; otherwise move the checkpointed step into a submodule of its own, which then "
    "becomes an opaque module"
)
# the class of the library transformers whose subclasses checkpoint their own forward
_LAYER = "GradientCheckpointingLayer"
# the attribute of such a layer that holds its checkpoint function
_FUNCTION = "_gradient_checkpointing_func"
# whether a class is such a layer's; weak, because each GraphModule has a class of its own
_known: WeakKeyDictionary[type, bool] = WeakKeyDictionary()


def checkpoints_itself(module: nn.Module) -> bool:
    """Return whether a module checkpoints its whole forward when it is called in train mode, as layers of the library transformers do.

    The base class of these layers wraps the forward of each subclass, also of the subclasses that
    graphreg generates. So a block of such a subclass checkpoints its emitted code, just as the
    model's module checkpoints its forward.
    """
    kind = type(module)
    if kind not in _known:
        _known[kind] = any(base.__name__ == _LAYER for base in kind.__mro__)
    return _known[kind] and getattr(module, "gradient_checkpointing", False) is True


def see_through_checkpoints(model: nn.Module, changes: Changes) -> None:
    """Make modules that checkpoint their own forward run it without a checkpoint, until the block of ``changes`` ends.

    So a trace has the values inside these forwards. No checkpoint is lost, because the plan makes
    such modules blocks, which checkpoint their code. Only the checkpoint function is replaced. The
    attribute ``gradient_checkpointing`` stays as it is, because the library transformers also
    decides by it whether to use caches.
    """
    for module in model.modules():
        if checkpoints_itself(module):
            changes.put(vars(module), _FUNCTION, _run)


def _run(forward: Callable[..., Any], *args: Any) -> Any:
    return forward(*args)
