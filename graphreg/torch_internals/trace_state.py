"""Restores the global state that torch changes during a trace, even if an interrupt ends the trace.

What a forward may change of torch's state is restored after each run of it, too (``global_state.py``).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch._C._dynamo.guards import set_is_in_mode_without_ignore_compile_internals
from torch.fx import _symbolic_trace
from torch.utils import _python_dispatch

from graphreg.torch_internals.global_state import GlobalState
from graphreg.torch_internals.interpreter import CalledInstead
from graphreg.torch_internals.patching import Changes, outermost, put_back, there

# Where torch.fx stores whether it is tracing: up to torch 2.14 in one flag for all threads, from 2.15 on in one flag for each thread.
_FLAG: tuple[Any, tuple[str, ...]] = (
    (_symbolic_trace._is_fx_tracing_tls, ("flag",))
    if hasattr(_symbolic_trace, "_is_fx_tracing_tls")
    else (_symbolic_trace, ("_is_fx_tracing_flag",))
)
# Flags with which torch stores that a dispatch mode is active, in addition to the stack of modes. While the flags are set, Dynamo compiles
# nothing.
_DISPATCHES = ("_is_in_torch_dispatch_mode", "_is_in_non_infra_torch_dispatch_mode", "_is_in_any_mode_without_ignore_compile_internals")
_PLACES = (  # attributes that torch changes while it traces
    (nn.Module, ("__call__", "__getattr__")),
    (nn.Module.__call__, ("__code__",)),
    (nn.Module.__getattr__, ("__code__",)),
    (_symbolic_trace, ("CURRENT_PATCHER",)),
    _FLAG,
    (_python_dispatch, _DISPATCHES),
    (torch.compiler, ("_is_compiling_flag", "_is_exporting_flag")),
    (torch._guards._TLS, ("compile_context", "tracing_context")),
    (warnings, ("filters", "showwarning", "_showwarnmsg_impl")),
)


def restore_after_trace(changes: Changes) -> None:
    """Restore the global state that torch changes during a trace, if an exception ends the block of ``changes``; its modes in any case.

    Otherwise an interrupt between two steps of torch's own clean-up would leave the process in tracing mode forever. If the trace succeeds,
    torch has restored all of it, and what differs is of another thread. ``changes`` becomes the outermost ``Changes`` of the thread. If the
    thread already has an outermost ``Changes``, do nothing.
    """
    if not changes.outermost():
        return
    for place, names in _PLACES:
        for name in names:
            changes.if_raised(put_back(place, name))
    dispatches = _python_dispatch.is_in_any_mode_without_ignore_compile_internals()
    changes.if_raised(partial(set_is_in_mode_without_ignore_compile_internals, dispatches))
    changes.later(GlobalState().restore)


def restore_fx_patches() -> None:
    """Make the thread's outermost ``Changes`` undo all patches of the running torch.fx trace, including patches that it makes later."""
    patcher = getattr(_symbolic_trace, "CURRENT_PATCHER", None)
    if (changes := outermost()) is not None and patcher is not None:
        changes.later(partial(_unpatched, patcher.patches_made))


def _unpatched(patches: Iterable[Any]) -> None:
    for patch in list(patches):
        if isinstance(patch, CalledInstead) or there(patch.frame_dict, patch.fn_name) is patch.new_fn:
            patch.revert()
