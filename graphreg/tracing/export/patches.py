"""Replaces functions of torch while a forward is recorded: by functions that raise, or that record a call as one operation."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks

from graphreg.torch_internals.checkpointing import before_checkpoints
from graphreg.torch_internals.fx import wrapped_functions
from graphreg.torch_internals.patching import Changes
from graphreg.tracing.checkpoints import CHECKPOINTS
from graphreg.tracing.export.op_record import KeepOpaque


def refuse_untraceable(changes: Changes, is_recording: Callable[[], bool]) -> None:
    """Make checkpoints, inference mode, hooks on saved tensors and ``torch.autograd.Function`` raise, because a trace would lose them.

    Args:
        changes: Restores the functions when its block ends.
        is_recording: Whether the model's code runs and is being recorded.
    """
    # ``apply`` is a Python classmethod up to torch 2.14 and a C one from 2.15 on. Both are
    # descriptors, so __get__ works for both.
    inherited = inspect.getattr_static(torch.autograd.Function, "apply")

    def refuse_checkpoint() -> None:
        if is_recording():
            raise KeepOpaque(CHECKPOINTS)

    original_enter = torch.inference_mode.__enter__

    def enter(mode: torch.inference_mode) -> None:
        if is_recording() and mode.mode:
            raise KeepOpaque("it works under torch.inference_mode, and a trace would lose that")
        original_enter(mode)

    original_hooks = saved_tensors_hooks.__enter__

    def enter_hooks(hooks: saved_tensors_hooks) -> None:
        if is_recording():
            raise KeepOpaque("it puts hooks on saved tensors, and a trace would lose them")
        original_hooks(hooks)

    def apply(cls: type, *args: Any, **kwargs: Any) -> Any:
        if is_recording():
            raise KeepOpaque("it calls a torch.autograd.Function, and a trace would lose its backward")
        return inherited.__get__(None, cls)(*args, **kwargs)

    before_checkpoints(changes, refuse_checkpoint)
    changes.put(torch.autograd.Function, "apply", classmethod(apply))
    changes.put(torch.inference_mode, "__enter__", enter)
    changes.put(saved_tensors_hooks, "__enter__", enter_hooks)


def single_operations(function: Callable[..., Any]) -> list[tuple[Any, str, Any]]:
    """Return replacements, which record a call as one operation, for torchvision's operations and functions marked with ``torch.fx.wrap``.

    Args:
        function: Records a call of a function, given the function, whether the user's code wrote an
            operator (``+``), and the arguments.

    Returns:
        For each function, the Python module that has it, its name there, and the replacement.
    """
    ops: Any = sys.modules.get("torchvision.ops")
    functions: list[tuple[str, str, Any]] = [(f.__module__, name, f) for name, f in (vars(ops) if ops else {}).items() if callable(f)]
    functions += wrapped_functions()
    here = [(sys.modules[home], name, f) for home, name, f in functions if home in sys.modules and isinstance(f, FunctionType)]
    return [(home, name, partial(function, f, False)) for home, name, f in here]
