"""The modes of torch that are on: of functions, of operators, and those that trace. What runs under one is not what it seems."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch._ops import _set_mode_pre_dispatch, mode_stack_state_for_pre_dispatch, unset_mode_pre_dispatch
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
from torch.utils._python_dispatch import _disable_current_modes

# A block in which no mode of operators is on, also no tracer's: what is looked at there is the tensor itself.
without_modes: Callable[[], AbstractContextManager[Any]] = _disable_current_modes
# A block in which neither modes of functions nor tensor subclasses see calls. torch.overrides offers it to subclasses, without the modes.
without_functions: Callable[[], AbstractContextManager[None]] = torch._C.DisableTorchFunction
# How many modes of operators are on, and the state of a trace of torch.jit (None where there is none). Asked at each draw of noise, so
# these are torch's own functions.
operator_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack
jit_trace: Callable[[], Any] = torch._C._get_tracing_state


def is_exporting() -> bool:
    """Whether torch.export traces. ``torch.compiler.is_exporting()`` is always true in what Dynamo traces, up to torch 2.12."""
    return bool(torch.compiler._is_exporting_flag)


def is_functionalized() -> bool:
    """Whether AOTAutograd traces: it then makes anew, outside of its graph, what shares storage."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FUNCTIONAL) is not None


def is_gradient_switch(function: object) -> bool:
    """Whether a function that a mode is told of is the one that ``torch.no_grad`` and its like call to set whether autograd records."""
    return function is torch._C._set_grad_enabled


@contextmanager
def without_proxies() -> Iterator[None]:
    """A block that torch.export writes nothing down of.

    As ``proxy_tensor.disable_proxy_modes_tracing``, which goes through every operator known on its way back; torch does so itself.
    """
    modes = mode_stack_state_for_pre_dispatch()  # type: ignore[no-untyped-call]
    mode = modes.get(0)
    try:
        unset_mode_pre_dispatch(torch._C._TorchDispatchModeKey.PROXY)  # type: ignore[no-untyped-call]
        yield
    finally:
        if modes.get(0) is None:
            _set_mode_pre_dispatch(mode)  # type: ignore[no-untyped-call]
