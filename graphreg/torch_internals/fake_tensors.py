"""Fake tensors, which have shapes but no data: torch's modes that make them, and the mode of a running compilation or export."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch._guards import TracingContext
from torch._subclasses.fake_tensor import FakeCopyMode as FakeCopyMode
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.fake_tensor import FakeTensorMode as FakeTensorMode

from graphreg.torch_internals.patching import Changes

FAKE_LOGGER = FakeTensorMode.__module__  # logs a traceback if fake tensors do not support an operation; the error says the same


def fake_mode() -> FakeTensorMode | None:
    """Return the fake tensor mode of the running compilation or export; None if neither runs.

    A tensor that is added to the graph must be a fake tensor of this mode.
    """
    context = TracingContext.try_get()
    mode: FakeTensorMode | None = context.fake_mode if context is not None else None
    return mode


def is_fake(tensor: Tensor) -> bool:
    """Return whether a tensor is a fake one, also if the compilation or export that made it has ended."""
    return isinstance(tensor, FakeTensor)


def size_decisions() -> list[Any]:
    """Return torch's list of the conditions on sizes (guards) that the running compilation or export has decided so far.

    torch appends to this list. So the conditions that one operation decides are those that are appended while the operation runs.
    """
    mode: Any = fake_mode()
    decisions: list[Any] = mode.shape_env.guards if mode and mode.shape_env else []
    return decisions


def take_assignments(changes: Changes, assigned: Callable[[Tensor, str, Any], None]) -> None:
    """Until the changes end, call ``assigned(tensor, name, value)`` instead of assigning an attribute of a fake tensor.

    While torch.export runs, a forward's tensors are fake tensors. A ``TorchFunctionMode`` does not see the assignment of a new attribute.
    """
    changes.put(FakeTensor, "__setattr__", assigned)


_RULES = "torch._dynamo.trace_rules"


def has_function_table() -> bool:
    """Return whether Dynamo has built its table of torch's functions."""
    rules = sys.modules.get(_RULES)
    return rules is not None and rules.get_torch_obj_rule_map.cache_info().currsize > 0


def make_function_table() -> None:
    """Import Dynamo and have it build its table of torch's functions, which takes three seconds.

    Computing with fake tensors does both, too. But while torch.fx traces, wrappers replace ``torch.arange`` and other functions. A table
    that is built then would have the wrappers, and no graph with these functions would compile any more in this process.
    """
    importlib.import_module(_RULES).get_torch_obj_rule_map()
