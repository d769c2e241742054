"""What torch.fx keeps for itself while it traces and emits: whether it traces, what it takes as one operation, how it names values."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any

from torch import fx
from torch.fx._symbolic_trace import _wrapped_fns_to_patch, is_fx_symbolic_tracing
from torch.fx.graph import _snake_case

# Whether torch.fx traces, up to torch 2.14 in any thread: one flag for all. Asked at each call of a module, so it is torch's own.
is_traced: Callable[[], bool] = is_fx_symbolic_tracing
# How torch.fx and Dynamo make the name of a value of that of a module's class: ``MaxPool2d`` to ``max_pool2d``. Names of sites follow it.
snake_case: Callable[[str], str] = _snake_case
_TRACE = fx.Tracer.trace.__code__


def traces_here() -> bool:
    """Whether it is this thread that traces with torch.fx, by Python's stack."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not _TRACE:
        frame = frame.f_back
    return frame is not None


def wrapped_functions() -> list[tuple[str, str, Any]]:
    """The functions under ``torch.fx.wrap``, as (module, name, function): each is one operation for torch.fx, and not for torch.export."""
    return [(str(names.get("__name__")), name, names.get(name)) for (_, name), names in _wrapped_fns_to_patch.items()]


def take_as_one(tracer: fx.Tracer, functions: Iterable[Any], places: Iterable[Any]) -> None:
    """Have a tracer take functions as one operation each, also where they stand in these modules: ``autowrap_functions`` in the
    constructor does so in the user's code only."""
    tracer._autowrap_function_ids.update(map(id, functions))
    tracer._autowrap_search.extend(places)


def share_emitter(graph: fx.Graph, copy: fx.Graph) -> None:
    """Have a copy of a graph emitted in the same way: ``torch.fx.Graph.graph_copy`` leaves its generator of code out."""
    copy._codegen = graph._codegen


def value_name(graph: fx.Graph, function_name: str) -> str:
    """The base of the name that torch.fx gives the value of a function."""
    return graph._target_to_str(function_name)
