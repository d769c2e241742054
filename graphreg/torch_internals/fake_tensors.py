"""Fake tensors, which have shapes and no data: torch's modes that make them, and the one of the compilation or export that runs."""

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

FAKE_LOGGER = FakeTensorMode.__module__  # logs a traceback for what it cannot follow; the error says as much


def fake_mode() -> FakeTensorMode | None:
    """The fake tensor mode of the compilation or export that runs; what is added to its graph must be a tensor of the same."""
    context = TracingContext.try_get()
    mode: FakeTensorMode | None = context.fake_mode if context is not None else None
    return mode


def is_fake(tensor: Tensor) -> bool:
    """Whether a tensor has a shape and no data, of the compilation or export that runs or of one that has ended."""
    return isinstance(tensor, FakeTensor)


def size_decisions() -> list[Any]:
    """torch's own list of what was decided on sizes so far, in the compilation or export that runs; it grows as more is decided.

    What an operation decides for itself while it runs is told by the list's length before and after.
    """
    mode: Any = fake_mode()
    decisions: list[Any] = mode.shape_env.guards if mode and mode.shape_env else []
    return decisions


def take_assignments(changes: Changes, assigned: Callable[[Tensor, str, Any], None]) -> None:
    """Until the changes end: have ``assigned(tensor, name, value)`` called in the place of an assignment to an attribute of a fake tensor.

    No mode of functions is told of a name that a tensor does not have yet, and torch.export's values are fake tensors.
    """
    changes.put(FakeTensor, "__setattr__", assigned)


_RULES = "torch._dynamo.trace_rules"


def has_function_table() -> bool:
    """Whether Dynamo's table of torch's functions is made."""
    rules = sys.modules.get(_RULES)
    return rules is not None and rules.get_torch_obj_rule_map.cache_info().currsize > 0


def make_function_table() -> None:
    """Have Dynamo imported, and its table of torch's functions made: three seconds, for whoever asks.

    Fake tensors do both, and in a trace torch.fx has put its own in the place of ``torch.arange`` and others: Dynamo would
    know these and not torch's, and no graph with them in it would compile any more in this process.
    """
    importlib.import_module(_RULES).get_torch_obj_rule_map()
