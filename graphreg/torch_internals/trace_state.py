"""What torch has in other places while it traces, and what it has on: put back when a trace ends, however it ends."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch._ops import mode_stack_state_for_pre_dispatch
from torch.fx import _symbolic_trace

from graphreg.torch_internals.patching import Changes, outermost, there

# Whether torch.fx traces: one flag for all threads up to torch 2.14, from 2.15 on one of each.
_FLAG: tuple[Any, tuple[str, ...]] = (
    (_symbolic_trace._is_fx_tracing_tls, ("flag",))
    if hasattr(_symbolic_trace, "_is_fx_tracing_tls")
    else (_symbolic_trace, ("_is_fx_tracing_flag",))
)
_PLACES = (  # what torch has in other places while it traces
    (nn.Module, ("__call__", "__getattr__")),
    (_symbolic_trace, ("CURRENT_PATCHER",)),
    _FLAG,
    (torch.compiler, ("_is_compiling_flag", "_is_exporting_flag")),
    (torch._guards._TLS, ("compile_context", "tracing_context")),
    (warnings, ("filters", "showwarning", "_showwarnmsg_impl")),
)


def restore_after_trace(changes: Changes) -> None:
    """Have the changes know of all within the block, and put back what torch itself changes in it.

    An interrupt between two steps of torch's own clean-up would leave the process tracing for ever.
    """
    if not changes.outermost():
        return
    for place, names in _PLACES:
        for name in names:
            changes.keep(place, name)
    changes.later(partial(_modes_back, *_modes()))
    changes.later(partial(torch._C._set_grad_enabled, torch.is_grad_enabled()))


def restore_fx_patches() -> None:
    """Called within a trace of torch.fx: have what it has patched, and what it will patch until it ends, put back by the changes, too."""
    patcher = getattr(_symbolic_trace, "CURRENT_PATCHER", None)
    if (changes := outermost()) is not None and patcher is not None:
        changes.later(partial(_unpatched, patcher.patches_made))


def _unpatched(patches: Iterable[Any]) -> None:
    for patch in list(patches):
        if there(patch.frame_dict, patch.fn_name) is patch.new_fn:
            patch.revert()


def _modes() -> tuple[int, int, tuple[Any, Any]]:
    """The modes of torch that are on: how many of functions and of operators, and those of torch.export."""
    exporting = mode_stack_state_for_pre_dispatch()  # type: ignore[no-untyped-call]
    return torch._C._len_torch_function_stack(), torch._C._len_torch_dispatch_stack(), (exporting.get(0), exporting.get(1))


def _modes_back(functions: int, operators: int, exporting: tuple[Any, Any]) -> None:
    while torch._C._len_torch_function_stack() > functions:
        torch._C._pop_torch_function_stack()
    while torch._C._len_torch_dispatch_stack() > operators:
        torch._C._pop_torch_dispatch_stack(None)
    now = mode_stack_state_for_pre_dispatch()  # type: ignore[no-untyped-call]
    if (now.get(0), now.get(1)) != exporting:
        now.set(0, exporting[0])
        now.set(1, exporting[1])
        torch._C._dispatch_tls_set_dispatch_key_included(torch._C.DispatchKey.PreDispatch, any(exporting))
