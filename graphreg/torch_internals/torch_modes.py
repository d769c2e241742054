"""torch's modes (``TorchFunctionMode``, ``TorchDispatchMode``, the modes of tracers): which are active, and blocks without them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch._ops import _set_mode_pre_dispatch, mode_stack_state_for_pre_dispatch, unset_mode_pre_dispatch
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
from torch.utils._python_dispatch import _disable_current_modes

from graphreg.torch_internals.patching import Changes

# Opens a block without any dispatch mode, also without those of tracers, so that operators get the tensors themselves.
without_modes: Callable[[], AbstractContextManager[Any]] = _disable_current_modes
# These return the number of active dispatch modes, and the state of a torch.jit trace (None if none runs). Each draw of noise calls them,
# so they are torch's own functions.
operator_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack
jit_trace: Callable[[], Any] = torch._C._get_tracing_state


def is_exporting() -> bool:
    """Return whether torch.export traces. Up to torch 2.12, ``torch.compiler.is_exporting()`` is always True in code that Dynamo traces."""
    return bool(torch.compiler._is_exporting_flag)


def is_functionalized() -> bool:
    """Return whether AOTAutograd is tracing. After its graph, it makes outputs that share storage anew, as views of a base."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FUNCTIONAL) is not None


def is_gradient_switch(function: object) -> bool:
    """Return whether a function that a ``TorchFunctionMode`` sees switches grad mode; ``torch.no_grad`` and the like call it."""
    return function is torch._C._set_grad_enabled


@contextmanager
def without_functions() -> Iterator[None]:
    """Open a block in which neither function modes nor tensor subclasses intercept calls.

    ``torch._C.DisableTorchFunction`` does the same. But if an interrupt comes at the end of its block, before Python calls ``__exit__``,
    no call of the thread is intercepted any more, and torch.fx cannot trace.
    """
    with Changes() as changes, changes:
        torchs: Any = torch._C
        changes.later(partial(torchs._set_torch_function_state, torchs._get_torch_function_state()))
        torchs._set_torch_function_state(torchs._TorchFunctionState.ALL_DISABLED)
        yield


@contextmanager
def without_proxies() -> Iterator[None]:
    """Open a block in which torch.export records nothing.

    ``proxy_tensor.disable_proxy_modes_tracing`` does the same, but at its end clears the caches of all operators used so far, which is
    slow. Setting the mode directly is safe: torch's own dispatch of operators does so.
    """
    modes = mode_stack_state_for_pre_dispatch()  # type: ignore[no-untyped-call]
    mode = modes.get(0)
    try:
        unset_mode_pre_dispatch(torch._C._TorchDispatchModeKey.PROXY)  # type: ignore[no-untyped-call]
        yield
    finally:
        if modes.get(0) is None:
            _set_mode_pre_dispatch(mode)  # type: ignore[no-untyped-call]
