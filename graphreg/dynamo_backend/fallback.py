"""Makes it an error if torch.compile leaves a whole call to eager, where nothing would be regularized, and says which code it left.

A backend is called only when there is a graph. So a callback of Dynamo's says when a compilation begins, and at the end of a call
through our backend it is checked whether a graph came of it. Dynamo's counters say which code was skipped, and why.
"""

from __future__ import annotations

import logging
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from graphreg.dynamo_backend.capture_place import Functions, root_of
from graphreg.errors import GraphRegError
from graphreg.runtime import backend_handle
from graphreg.torch_internals import (
    CompiledCall,
    backend_in,
    compiled_call,
    function_of,
    left_to_eager,
    name_in,
    on_compilation_start,
    skipped_code,
)

log = logging.getLogger("graphreg")

NAME = "graphreg"  # the backend's name in torch.compile's records

_before = WeakKeyDictionary[Any, Counter[str]]()  # by torch.compile's context: Dynamo's counters before its first call


def watch() -> None:
    """Register the callback for the start of each compilation; ``torch.compiler.reset`` removes it."""
    on_compilation_start(_compiling)


def left(context: Any = None) -> str:
    """Describe, in a sentence, the code that calls through a torch.compile left to eager; empty if there is none, or no call runs."""
    running = compiled_call() if context is None else None
    before = _before.get(running.record if running is not None else context)
    new = [text for text, count in left_to_eager().items() if before is not None and count > before[text]]
    places = {place: f"{_code(*place)}: {text.splitlines()[0].strip().rstrip('.')}" for text in new for place in skipped_code(text)}
    if not places:
        return ""
    return (
        f" torch.compile leaves code to eager whose graph breaks in a loop ({'; '.join(places.values())}). Decide there without the "
        "data (torch.where, a mask), or put what stands before, in and behind the loop into submodules, each with a forward of its own."
    )


def _code(name: str, file: str, line: str) -> str:
    function = function_of(name)
    return f"{function}{' from there on' * (function != name)}, {file}:{line}"


def _compiling(_: Any) -> None:
    """When Dynamo begins the first compilation for a call through our backend, hook the end of this and later calls."""
    try:
        running = _new()
    except Exception as error:  # Dynamo calls this for every compilation of the process: a failure here must not stop others' code
        log.debug("a compilation is not watched: %s", error)
        return
    if running is not None:
        _before[running.record] = Counter(left_to_eager())
        running.at_each_call(_watched(root_of(running), running.record, backend_in(running.record)))


def _new() -> CompiledCall | None:
    """Return the call that is running, if it goes through our backend and is not hooked yet."""
    running = compiled_call()
    inner = backend_in(running.record) if running is not None else None
    return None if running is None or running.record in _before or name_in(inner) != NAME else running


def _watched(model: nn.Module, context: Any, inner: Any) -> Callable[[], Callable[[], None]]:
    title = model.title if isinstance(model, Functions) else type(model).__name__

    def begin() -> Callable[[], None]:
        before = sys.exc_info()[1]

        def end() -> None:
            backend = backend_handle(inner)
            if sys.exc_info()[1] is before and (backend is None or not backend.subgraphs):  # it has not failed
                why = left(context) or " TORCH_LOGS=graph_breaks has torch say why."
                raise GraphRegError(f"torch.compile captured no graph of {title}, so nothing of it is regularized.{why}")

        return end

    return begin
