"""What is put in the place of torch's own functions while a forward is recorded: refusals, functions that are one operation."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FunctionType
from typing import Any

import torch
import torch.utils.checkpoint as checkpointing
from torch._ops import _set_mode_pre_dispatch, mode_stack_state_for_pre_dispatch, unset_mode_pre_dispatch
from torch.fx._symbolic_trace import _wrapped_fns_to_patch
from torch.nn.modules import transformer

from graphreg.torch_internals import checkpoints
from graphreg.tracing.export.op_record import Whole


@contextmanager
def untraced() -> Iterator[None]:
    """As ``proxy_tensor.disable_proxy_modes_tracing``, which goes through every operator known on its way back; torch does so itself."""
    modes = mode_stack_state_for_pre_dispatch()  # type: ignore[no-untyped-call]
    mode = modes.get(0)
    try:
        unset_mode_pre_dispatch(torch._C._TorchDispatchModeKey.PROXY)  # type: ignore[no-untyped-call]
        yield
    finally:
        if modes.get(0) is None:
            _set_mode_pre_dispatch(mode)  # type: ignore[no-untyped-call]


def refused(seeing: Callable[[], bool]) -> list[tuple[Any, str, Any]]:
    """What a trace would lose: activation checkpointing, derivatives written by hand. ``seeing``: whether code of the model's runs."""

    def refusal(original: Callable[..., Any], reason: str) -> Callable[..., Any]:
        def instead(*args: Any, **kwargs: Any) -> Any:
            if seeing():
                raise Whole(reason)
            return original(*args, **kwargs)

        return instead

    # a classmethod of Python's up to torch 2.14, one of C from 2.15 on: what both give is what they are asked for, by the class
    inherited = inspect.getattr_static(torch.autograd.Function, "apply")

    def apply(cls: type, *args: Any, **kwargs: Any) -> Any:
        return inherited.__get__(None, cls)(*args, **kwargs)

    checkpoint, function = "it checkpoints activations, which a trace would lose", checkpointing.CheckpointFunction
    derivative = "it calls a torch.autograd.Function, and a trace would lose its backward"
    return [
        *((checkpointing, name, refusal(begin, checkpoint)) for name, begin in checkpoints().items()),
        (function, "apply", refusal(function.apply, checkpoint)),
        (torch.autograd.Function, "apply", classmethod(refusal(apply, derivative))),
    ]


def undetected() -> tuple[Any, str, Any]:
    """``nn.Transformer`` looks into a mask for whether it is the causal one, to say so to the attention beside it: a trace has no values.

    Not said, the attention reads the mask. It is the same function.
    """
    theirs = transformer._detect_is_causal_mask

    def detected(mask: Any, is_causal: bool | None = None, size: int | None = None) -> bool:
        found: bool = theirs(mask, bool(is_causal), size)
        return found

    return transformer, "_detect_is_causal_mask", detected


def wrapped(function: Callable[..., Any]) -> list[tuple[Any, str, Any]]:
    """What torch.fx takes as one operation: functions under ``torch.fx.wrap``, and torchvision's, which its own listing wraps."""
    ops: Any = sys.modules.get("torchvision.ops")
    found: list[tuple[str, str, Any]] = [(f.__module__, name, f) for name, f in (vars(ops) if ops else {}).items() if callable(f)]
    found += [(str(names.get("__name__")), name, names.get(name)) for (_, name), names in _wrapped_fns_to_patch.items()]
    here = [(sys.modules[home], name, f) for home, name, f in found if home in sys.modules and isinstance(f, FunctionType)]
    return [(home, name, partial(function, f, False)) for home, name, f in here]
