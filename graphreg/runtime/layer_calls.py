"""The functions by which a graph reads replaced parameters: ``call_with`` calls a layer, ``instead_of`` replaces what a node fetched.

The layer itself is called, with its hooks, and keeps its parameters. Graphs name these functions, so pickles contain their names.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.func import functional_call

from graphreg.torch_internals import read_weights_again

LAYER, PARAMETERS = "graphreg_layer", "graphreg_parameters"  # keywords of ``call_with`` that no layer's forward has


class _Locks:
    """A lock for each layer: while a thread calls it with other parameters, no other thread of ours must call it so."""

    by_layer: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()
    guard = threading.Lock()

    @classmethod
    def of(cls, layer: nn.Module) -> Any:
        with cls.guard:
            return cls.by_layer.setdefault(layer, threading.RLock())


def _new_locks() -> None:
    _Locks.guard, _Locks.by_layer = threading.Lock(), WeakKeyDictionary()  # a thread of the parent may have held them


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_new_locks)


def call_with(*args: Any, graphreg_layer: nn.Module, graphreg_parameters: Mapping[str, Tensor], **kwargs: Any) -> Any:
    """Call a layer with other tensors in place of some of its parameters.

    Args:
        args: The layer's positional arguments.
        graphreg_layer: The layer.
        graphreg_parameters: By name of a parameter in the layer, the tensor to use instead; the parameter itself changes nothing.
        kwargs: The layer's keyword arguments.
    """
    replaced = {name: tensor for name, tensor in graphreg_parameters.items() if tensor is not graphreg_layer.get_parameter(name)}
    if not replaced:
        return graphreg_layer(*args, **kwargs)
    if torch.compiler.is_compiling():  # one thread compiles at a time
        return functional_call(graphreg_layer, replaced, args, kwargs, tie_weights=False)
    with _Locks.of(graphreg_layer):
        try:
            return functional_call(graphreg_layer, replaced, args, kwargs, tie_weights=False)
        finally:
            read_weights_again(graphreg_layer)


def instead_of(w: Tensor, replacement: Tensor) -> Tensor:
    """Return ``replacement``, which a node reads instead of the parameter ``w``."""
    return replacement
