"""The frames of Python's stack during a trace: whose code runs in them, and whether the model's code catches what is raised."""

from __future__ import annotations

import functools
import sys
import types

from graphreg.ir.contents import FOREIGN
from graphreg.torch_internals.bytecode import caught_by, is_discarded, is_guarded

_TRACE = "graphreg.tracing.symbolic.symbolic"  # the code that starts a trace
_EXPORT = "graphreg.tracing.export.export"  # the same, of torch.export


def home_of(frame: types.FrameType) -> str:
    """Return the name of the Python module whose code runs in a frame."""
    return str(frame.f_globals.get("__name__", ""))


def is_foreign(frame: types.FrameType) -> bool:
    """Return whether a frame runs code of torch, graphreg, Python's library or the like, and not of a model."""
    return _is_foreign_name(home_of(frame))


@functools.cache
def _is_foreign_name(name: str) -> bool:
    return name.partition(".")[0] in FOREIGN


def is_caught(frame: types.FrameType | None, by_with: bool = False) -> bool:
    """Return whether the model's code may catch what is raised in a frame. ``by_with``: whether a ``with`` counts (``suppress``)."""
    while frame is not None and home_of(frame) != _TRACE:
        if not is_foreign(frame) and is_guarded(frame, by_with):
            return True
        frame = frame.f_back
    return False


def note_caught(caught: list[str], kinds: set[str]) -> None:
    """Add the names of those classes of an error that the model's code may catch if torch.export raises it now."""
    caught += kinds.intersection(caught_here(_EXPORT))


def discards_result(depth: int) -> bool:
    """Return whether the code ``depth`` frames up the stack from the caller throws the result of its present call away."""
    return is_discarded(sys._getframe(depth + 1))


def caught_here(trace: str = _TRACE, within: types.CodeType | None = None, depth: int = 0) -> set[str]:
    """Return the names of the classes of errors that the model's code may catch if the caller of this function raises them.

    Args:
        trace: The Python module that has started the trace.
        within: The code of a function of graphreg. Who catches what comes out of its innermost call does not count.
        depth: The number of calls between the caller of this function and the one that raises.
    """
    # asked for each operation of a trace, so the cheap questions come first
    frame, kinds, start = sys._getframe(depth + 1), set[str](), vars(sys.modules[trace])
    while frame is not None and frame.f_globals is not start and frame.f_code is not within:
        if frame.f_code.co_exceptiontable and not is_foreign(frame):
            kinds |= caught_by(frame)
        frame = frame.f_back  # type: ignore[assignment]
    return kinds
