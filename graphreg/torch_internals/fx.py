"""torch.fx: whether it is tracing, which functions it records as one operation, how it names values and generates code."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any

from torch import fx
from torch.fx._symbolic_trace import _wrapped_fns_to_patch, is_fx_symbolic_tracing
from torch.fx.graph import _snake_case

# Whether torch.fx is tracing; up to torch 2.14 in any thread, because all threads share one flag. Each call of a module calls it, so it is
# torch's own function.
is_traced: Callable[[], bool] = is_fx_symbolic_tracing
# Makes the name of a value from that of a module's class, as torch.fx and Dynamo do: ``max_pool2d`` from ``MaxPool2d``. Names of sites use
# it, too.
snake_case: Callable[[str], str] = _snake_case
_TRACE = fx.Tracer.trace.__code__


def traces_here() -> bool:
    """Whether this thread is tracing with torch.fx, by the frames on its stack."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not _TRACE:
        frame = frame.f_back
    return frame is not None


def wrapped_functions() -> list[tuple[str, str, Any]]:
    """Return the functions registered with ``torch.fx.wrap``, as (module, name, function).

    torch.fx records a call of each as one operation; torch.export does not.
    """
    return [(str(names.get("__name__")), name, names.get(name)) for (_, name), names in _wrapped_fns_to_patch.items()]


def take_as_one(tracer: fx.Tracer, functions: Iterable[Any], places: Iterable[Any]) -> None:
    """Have a tracer record a call of any of these functions as one operation.

    ``places``: the modules in which the functions are replaced, beside the user's code. The tracer's argument ``autowrap_functions`` covers
    the user's code only.
    """
    tracer._autowrap_function_ids.update(map(id, functions))
    tracer._autowrap_search.extend(places)


def share_emitter(graph: fx.Graph, copy: fx.Graph) -> None:
    """Give a copy of a graph the code generator of the original, which ``torch.fx.Graph.graph_copy`` does not copy."""
    copy._codegen = graph._codegen


def value_name(graph: fx.Graph, function_name: str) -> str:
    """Return the base of the name that torch.fx gives the result of a function with this name."""
    return graph._target_to_str(function_name)
