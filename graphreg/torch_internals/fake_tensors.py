"""Fake tensors, which have shapes but no data: their modes, the guards that they cause, and Dynamo's table of torch's functions."""

from __future__ import annotations

import functools
import importlib
import sys
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._guards import TracingContext
from torch._subclasses.fake_tensor import FakeCopyMode as FakeCopyMode
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.fake_tensor import FakeTensorMode as FakeTensorMode

from graphreg.torch_internals.patching import Changes

FAKE_LOGGER = FakeTensorMode.__module__  # the name of a logger; if fake tensors do not support an operation, it logs the error's traceback


def fake_mode() -> FakeTensorMode | None:
    """Return the fake tensor mode of the running compilation or export; None if neither runs.

    If graphreg adds an input to the graph, the example of this input must be a fake tensor of this mode.
    """
    context = TracingContext.try_get()
    mode: FakeTensorMode | None = context.fake_mode if context is not None else None
    return mode


def is_fake(tensor: Tensor) -> bool:
    """Return whether a tensor is a fake tensor, even if the compilation or export that made the tensor has ended."""
    return isinstance(tensor, FakeTensor)


@functools.cache
def _own_attributes() -> frozenset[str]:
    return frozenset(vars(FakeTensorMode().from_tensor(torch.empty(0))))


def is_shape_alone(tensor: Tensor) -> bool:
    """Return whether a tensor is a fake tensor without values and without attributes that somebody has set."""
    return isinstance(tensor, FakeTensor) and tensor.constant is None and vars(tensor).keys() <= _own_attributes()


def size_decisions() -> list[Any]:
    """Return torch's list of guards: the conditions on sizes that the running compilation or export has decided so far.

    torch appends to this list while an operation runs. So a caller finds the guards of one operation by comparing the length of the list
    before and after the operation.
    """
    mode: Any = fake_mode()
    decisions: list[Any] = mode.shape_env.guards if mode and mode.shape_env else []
    return decisions


def take_assignments(changes: Changes, assigned: Callable[[Tensor, str, Any], None]) -> None:
    """Call ``assigned(tensor, name, value)`` instead of setting an attribute of a fake tensor, until the block of ``changes`` ends.

    While torch.export runs, the tensors of a forward are fake tensors. graphreg must notice if a forward sets a new attribute of a tensor.
    A ``TorchFunctionMode`` does not see this.
    """
    changes.put(FakeTensor, "__setattr__", assigned)


_DYNAMO = "torch._dynamo"
_RULES = f"{_DYNAMO}.trace_rules"


def has_function_table() -> bool:
    """Return whether Dynamo has built its table of torch's functions."""
    rules = sys.modules.get(_RULES)
    return rules is not None and rules.get_torch_obj_rule_map.cache_info().currsize > 0


def make_function_table() -> None:
    """Import Dynamo and make it build its table of torch's functions, which takes three seconds.

    The first computation with fake tensors would also build the table. But while torch.fx traces, wrappers replace ``torch.arange`` and
    other functions. A table built during a trace would contain the wrappers instead of these functions. Then no graph with these functions
    would compile any more in this process.
    """
    importlib.import_module(_RULES).get_torch_obj_rule_map()


class _BeforeDynamo:
    """An entry of ``sys.meta_path`` that calls a function when this thread imports Dynamo."""

    def __init__(self, act: Callable[[], None]) -> None:
        self._act, self._thread = act, threading.get_ident()

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name == _DYNAMO and threading.get_ident() == self._thread:
            self._act()


def instead_of_importing_dynamo(changes: Changes, act: Callable[[], None]) -> None:
    """Call ``act``, which raises, where code of this thread imports Dynamo, until the block of ``changes`` ends.

    Dynamo's modules keep torch's functions in tables. While torch.fx traces, they would take graphreg's wrappers for these functions, as
    with ``make_function_table``. Code that imports Dynamo at its first call is, for example, ``torch.utils.checkpoint``.
    """
    if _DYNAMO in sys.modules:
        return
    finder: Any = _BeforeDynamo(act)
    changes.later(lambda: sys.meta_path.remove(finder) if finder in sys.meta_path else None)
    sys.meta_path.insert(0, finder)
