"""Outputs that the library transformers captures (``output_hidden_states=True``, ``output_attentions=True``).

The forward of such a model installs hooks on its submodules at the first call that asks, and collects through them what these return. A
trace that installed them would change the model. So a trace ends where the forward would install them (``NeedsHooks``); they are
installed until the end of the trace, and the model is traced again. Then the graph contains what the hooks collect.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from torch import nn

from graphreg.torch_internals.modules import CAPTURING, FORWARD_HOOKS
from graphreg.torch_internals.other_threads import only_here
from graphreg.torch_internals.patching import Changes

_INSTALL = "maybe_install_capturing_hooks"  # the function of transformers that the forward calls
_INSTALLED = "_output_capturing_hooks_installed"  # the attribute by which transformers knows that a model has its hooks
_COLLECTOR = "_active_collector"  # the variable of transformers that holds what a forward collects now


class NeedsHooks(BaseException):
    """Ends a trace of a model that would install hooks. It is a BaseException, so that no forward catches it.

    Attributes:
        model: The model, or the part of it, that would install them.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


def stop_before_hooks(changes: Changes) -> None:
    """Make forwards of this thread raise NeedsHooks where they would install hooks, until the block of ``changes`` ends."""
    library: Any = sys.modules.get(CAPTURING)
    original = getattr(library, _INSTALL, None)
    if original is None:
        return

    def install(model: nn.Module) -> None:
        if not getattr(model, _INSTALLED, False):
            raise NeedsHooks(model)
        original(model)

    changes.put(library, _INSTALL, only_here(install, original))


def collecting_nothing(code: Callable[..., Any]) -> Callable[..., Any]:
    """Return code for Dynamo that runs ``code`` while nothing is collected: hooks would ask a ContextVar, which Dynamo cannot read.

    What transformers sets while Dynamo compiles is a plain variable, which the hooks then read instead.
    """
    collector: Any = getattr(sys.modules.get(CAPTURING), _COLLECTOR, None)
    if collector is None:
        return code

    def run(*args: Any, **kwargs: Any) -> Any:
        token = collector.set(None)
        try:
            return code(*args, **kwargs)
        finally:
            collector.reset(token)

    return run


def install_hooks(model: nn.Module, changes: Changes) -> None:
    """Install the hooks of a model, as its forward would do, until the block of ``changes`` ends."""
    for module in model.modules():
        changes.put(vars(module), FORWARD_HOOKS, OrderedDict(vars(module)[FORWARD_HOOKS]))
        changes.keep(vars(module), _INSTALLED)
    library: Any = sys.modules[CAPTURING]
    library.install_all_output_capturing_hooks(model)
    vars(model)[_INSTALLED] = True  # whatever the library notes, the next trace does not stop here again
