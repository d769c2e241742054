"""Raises an error if torch.compile leaves a whole call to eager, where nothing would be regularized. The error names the skipped code.

Dynamo calls a backend only when it has captured a graph. So graphreg registers a callback for the start of each compilation. At the end
of a call through its backend, graphreg checks whether a graph ran. Dynamo's counters say which code was skipped, and why.
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
from graphreg.dynamo_backend.wrappers import innermost_module
from graphreg.errors import GraphRegError
from graphreg.session.hosts import backend_host
from graphreg.torch_internals.dynamo import (
    backend_in,
    compiled_call,
    function_name_of,
    left_to_eager,
    name_in,
    on_compilation_start,
    skipped_code,
)
from graphreg.torch_internals.dynamo_marks import disable

log = logging.getLogger("graphreg")

NAME = "graphreg"  # the backend's name in torch.compile's records

_before = WeakKeyDictionary[Any, Counter[str]]()  # for each context object of torch.compile: Dynamo's counters before its first call


def watch() -> None:
    """Register the callback for the start of each compilation; ``torch.compiler.reset`` removes it."""
    on_compilation_start(_compiling)


def left(context: Any = None) -> str:
    """Return sentences about the code that torch.compile has left to eager in the calls of one model; ``""`` if there is none.

    ``context``: torch.compile's context object for that model. None means the context object of the running call; if no call is running,
    the result is ``""``.
    """
    running = compiled_call() if context is None else None
    before = _before.get(running.record if running is not None else context)
    new = [text for text, count in left_to_eager().items() if before is not None and count > before[text]]
    places = dict[tuple[str, str, str], str]()
    for text in new:
        for name, file, line in skipped_code(text):
            # Dynamo compiles what follows a graph break as a function of its own, with a name that
            # it makes up
            rest = "the rest of " if (function := function_name_of(name)) != name else ""
            places[name, file, line] = f"{rest}{function}, {file}:{line}: {text.splitlines()[0].strip().rstrip('.')}"
    if not places:
        return ""
    return (
        " If there is a graph break inside a loop, torch.compile runs the whole function, or all that remains of it, in eager. That "
        f"happened here: {'; '.join(places.values())}. Avoid the break: replace a branch on a tensor's values by torch.where or a mask, "
        "or move the code before, inside and after the loop into submodules, each with a forward of its own."
    )


@disable()  # the backward of a part before a graph break is compiled within the call: Dynamo would compile this, and wait for itself
def _compiling(_: Any) -> None:
    """When Dynamo begins the first compilation for a call through graphreg's backend, add a check at the end of this and later calls."""
    try:
        running = compiled_call()
        inner = backend_in(running.record) if running is not None else None
        is_new = running is not None and running.record not in _before and name_in(inner) == NAME
    except Exception as error:  # Dynamo calls this function at every compilation of the process, and an error would stop the compilation
        log.debug("a compilation is not watched: %s", error)
        return
    if running is not None and is_new:
        _before[running.record] = Counter(left_to_eager())
        running.at_each_call(_watched(root_of(running), running.record, inner), is_check=True)


def _watched(model: nn.Module, context: Any, inner: Any) -> Callable[[], Callable[[], None]]:
    title = model.title if isinstance(model, Functions) else type(innermost_module(model)).__name__

    def begin() -> Callable[[], None]:
        before, backend = sys.exc_info()[1], backend_host(inner)
        runs = backend.runs if backend is not None else 0

        def end() -> None:
            backend = backend_host(inner)
            if sys.exc_info()[1] is not before or (backend is not None and backend.runs > runs):  # the call has failed, or ran a graph
                return
            why, is_known = left(context), backend is not None and backend.subgraphs
            # a later call may have nothing to compute; in eval mode, nothing of it would be regularized
            if not is_known or (why and getattr(model, "training", True)):
                why = why or " If you set TORCH_LOGS=graph_breaks, torch says why."
                raise GraphRegError(f"torch.compile captured no graph of {title}, so nothing of it is regularized.{why}")

        return end

    return begin
