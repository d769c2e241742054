"""What is put in the place of torch's own functions while a forward is recorded: refusals, functions that are one operation."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from functools import partial
from types import FunctionType
from typing import Any

import torch

from graphreg.torch_internals import Changes, before_checkpoints, wrapped_functions
from graphreg.tracing.context import CHECKPOINTS
from graphreg.tracing.export.op_record import Whole


def refuse_lost(changes: Changes, seeing: Callable[[], bool]) -> None:
    """Until the changes end: refuse what a trace would lose, activation checkpointing, inference mode and derivatives written by hand.

    ``seeing``: whether code of the model's runs.
    """
    # a classmethod of Python's up to torch 2.14, one of C from 2.15 on: what both give is what they are asked for, by the class
    inherited = inspect.getattr_static(torch.autograd.Function, "apply")

    def refuse_checkpoint() -> None:
        if seeing():
            raise Whole(CHECKPOINTS)

    enters = torch.inference_mode.__enter__

    def enter(mode: torch.inference_mode) -> None:
        if seeing() and mode.mode:
            raise Whole("it works under torch.inference_mode, and a trace would lose that")
        enters(mode)

    def apply(cls: type, *args: Any, **kwargs: Any) -> Any:
        if seeing():
            raise Whole("it calls a torch.autograd.Function, and a trace would lose its backward")
        return inherited.__get__(None, cls)(*args, **kwargs)

    before_checkpoints(changes, refuse_checkpoint)
    changes.put(torch.autograd.Function, "apply", classmethod(apply))
    changes.put(torch.inference_mode, "__enter__", enter)


def wrapped(function: Callable[..., Any]) -> list[tuple[Any, str, Any]]:
    """What torch.fx takes as one operation: functions under ``torch.fx.wrap``, and torchvision's, which its own listing wraps."""
    ops: Any = sys.modules.get("torchvision.ops")
    found: list[tuple[str, str, Any]] = [(f.__module__, name, f) for name, f in (vars(ops) if ops else {}).items() if callable(f)]
    found += wrapped_functions()
    here = [(sys.modules[home], name, f) for home, name, f in found if home in sys.modules and isinstance(f, FunctionType)]
    return [(home, name, partial(function, f, False)) for home, name, f in here]
