"""Functions that a graph calls where a splice replaces a parameter: ``call_with`` calls a layer, ``instead_of`` returns the replacement.

A graph calls ``instead_of`` where a ``get_attr`` node fetches the parameter. ``call_with`` calls
the layer itself, with its hooks, and the layer keeps its parameters. Pickled graphs contain the
names of both functions.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from torch.func import functional_call

from graphreg.torch_internals.modules import read_weights_again
from graphreg.torch_internals.other_threads import is_compiling

# keywords of ``call_with`` that no layer's forward has
LAYER, PARAMETERS = "graphreg_layer", "graphreg_parameters"


class _Replacements(threading.local):
    """The tensors that replace parameters in this thread.

    ``replaced``: a dict. Each key is the ``id`` of a module's ``_PerThread``; the value maps names
    of parameters to their replacements.
    """

    def __init__(self) -> None:
        self.replaced: dict[int, Mapping[str, Tensor]] = {}


_thread = _Replacements()


class _PerThread(dict[str, Any]):
    """The dict that a module has as ``_parameters`` while threads call the module with replaced parameters.

    Each of these threads reads its own replacements, and every other thread reads the parameters.
    ``calls``: how many calls with replaced parameters are running.
    """

    def __init__(self, parameters: dict[str, Any]) -> None:
        super().__init__(parameters)
        self.parameters, self.calls = parameters, 0

    def __getitem__(self, name: str) -> Any:
        replaced = _thread.replaced.get(id(self), {})
        return replaced[name] if name in replaced else super().__getitem__(name)


class _Locks:
    """Locks: ``guard`` is held while a module's ``_parameters`` is exchanged; ``recurrent`` has a lock for each recurrent layer.

    A recurrent layer is locked for the whole call, because its kernel reads a list of weights that
    all threads share.
    """

    guard = threading.Lock()
    recurrent: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()


def _new_locks() -> None:
    # a thread of the parent process may have held the old locks
    _Locks.guard, _Locks.recurrent = threading.Lock(), WeakKeyDictionary()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_new_locks)


def call_with(*args: Any, graphreg_layer: nn.Module, graphreg_parameters: Mapping[str, Tensor], **kwargs: Any) -> Any:
    """Call a layer with other tensors in place of some of its parameters.

    Args:
        args: The layer's positional arguments.
        graphreg_layer: The layer.
        graphreg_parameters: A dict. Each key is the name of a parameter in the layer; the value is
            the tensor to use instead. A value that is the parameter itself has no effect.
        kwargs: The layer's keyword arguments.
    """
    if is_compiling():  # in compiled code, functional_call changes no module
        return functional_call(graphreg_layer, dict(graphreg_parameters), args, kwargs, tie_weights=False)
    by_owner: dict[nn.Module, dict[str, Tensor]] = {}
    for name, tensor in graphreg_parameters.items():
        path, _, own = name.rpartition(".")
        owner = graphreg_layer.get_submodule(path)
        if tensor is not owner._parameters[own]:
            by_owner.setdefault(owner, {})[own] = tensor
    with ExitStack() as stack:
        for owner, replaced in by_owner.items():
            stack.enter_context(_replaced(owner, replaced))
        return graphreg_layer(*args, **kwargs)


@contextmanager
def _replaced(owner: nn.Module, replaced: Mapping[str, Tensor]) -> Iterator[None]:
    """Replace parameters of a module for this thread."""
    with ExitStack() as stack:
        if isinstance(owner, nn.RNNBase):
            with _Locks.guard:
                lock = _Locks.recurrent.setdefault(owner, threading.RLock())
            stack.enter_context(lock)
            stack.callback(read_weights_again, owner)
        with _Locks.guard:
            here = owner._parameters
            parameters = here if isinstance(here, _PerThread) else _PerThread(here)
            parameters.calls += 1
            owner.__dict__["_parameters"] = parameters
        before = _thread.replaced.get(id(parameters))
        _thread.replaced[id(parameters)] = replaced
        stack.callback(_put_back, owner, parameters, before)
        yield


def _put_back(owner: nn.Module, parameters: _PerThread, before: Mapping[str, Tensor] | None) -> None:
    if before is None:
        del _thread.replaced[id(parameters)]
    else:
        _thread.replaced[id(parameters)] = before
    with _Locks.guard:
        parameters.calls -= 1
        if parameters.calls == 0:
            # keep parameters that a hook has registered during the calls
            parameters.parameters.update(parameters)
            owner.__dict__["_parameters"] = parameters.parameters


def instead_of(w: Tensor, replacement: Tensor) -> Tensor:
    """Return ``replacement``, which a node reads instead of the parameter ``w``."""
    return replacement
