"""What is put in the place of something else for a while, and goes back whatever ends the while.

An interrupt may come between any two steps of Python, also where a block begins or ends. So what changes is noted before it changes,
and goes back twice if need be: by ``with changes, changes``, the second of which does what was left when the first was interrupted, and
by the outermost changes of the thread, which know of all within them.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable
from functools import partial
from types import GeneratorType, TracebackType
from typing import Any

_MISSING = object()


class _Thread(threading.local):
    outermost: Changes | None = None
    handled: BaseException | None = None  # what was being handled as they began


_thread = _Thread()


class _Change:
    """One way back, which is gone once."""

    def __init__(self, back: Callable[[], None]) -> None:
        self.back, self.gone = back, False

    def undo(self) -> None:
        if not self.gone:
            self.back()
            self.gone = True


class Changes:
    """Makes changes, and takes them back at the end of the block, the last first. Use it as ``with Changes() as changes, changes:``."""

    def __init__(self) -> None:
        self._made: list[_Change] = []

    def __enter__(self) -> Changes:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        outermost = _thread.outermost is self
        if outermost:
            _end_blocks(trace)
        for change in reversed(self._made):
            change.undo()
        if outermost:
            _thread.outermost = None
            if isinstance(error, Exception):
                raise_interrupt(error)

    def outermost(self) -> bool:
        """From here on: know of all changes that are made within the block. Whether others of the thread do not know already."""
        if _thread.outermost is not None:
            return False
        _thread.outermost, _thread.handled = self, sys.exc_info()[1]
        return True

    def later(self, back: Callable[[], None]) -> None:
        """Have something called at the end; called again if it is interrupted."""
        change = _Change(back)
        if _thread.outermost is not None and _thread.outermost is not self:
            _thread.outermost._made.append(change)
        self._made.append(change)

    def keep(self, place: Any, name: str) -> None:
        """Whatever becomes of an attribute, or of an entry of a dict: at the end it is what it is now."""
        self.later(partial(_put_back, place, name, there(place, name)))

    def put(self, place: Any, name: str, value: Any) -> None:
        """Put a value in the place of an attribute, or of an entry of a dict, until the end."""
        self.keep(place, name)
        if isinstance(place, dict):
            place[name] = value
        else:
            setattr(place, name, value)


def raise_interrupt(error: BaseException | None) -> None:
    """Raise the interrupt that an error hides: torch's own blocks may fail as an interrupt ends them."""
    while error is not None and error is not _thread.handled:
        is_ours = type(error).__module__.startswith("graphreg.")  # no error, so that no forward catches it
        if not is_ours and not isinstance(error, (Exception, GeneratorExit)):
            raise error
        error = error.__context__


def there(place: Any, name: str) -> Any:
    """An attribute of the place itself, or an entry of a dict; a mark where there is none."""
    return (place if isinstance(place, dict) else vars(place)).get(name, _MISSING)


def _put_back(place: Any, name: str, before: Any) -> None:
    if there(place, name) is before:
        return
    if isinstance(place, dict):
        place.pop(name) if before is _MISSING else place.update({name: before})
    else:
        delattr(place, name) if before is _MISSING else setattr(place, name, before)


def outermost() -> Changes | None:
    """The changes of this thread that know of all others."""
    return _thread.outermost


def _end_blocks(trace: TracebackType | None) -> None:
    """End the blocks of contextlib's that were interrupted where they begin or end.

    They would be ended when their generator is freed, and that may be long after, as the traceback of what interrupted them holds it.
    """
    while trace is not None:
        frame, trace = trace.tb_frame, trace.tb_next
        block = frame.f_locals.get("self") if frame.f_code.co_filename == contextlib.__file__ else None
        if isinstance(block, contextlib.ExitStack):
            block.close()
        generator = getattr(block, "gen", None)
        if isinstance(generator, GeneratorType) and not generator.gi_running:
            generator.close()
