"""Temporary changes of attributes and dict entries. They are undone at the end of a block, however the block ends.

An interrupt (such as ``KeyboardInterrupt``) may come between any two steps of Python, also while a block is entered or left. So a change is
recorded before it is made, and undoing is tried again if an interrupt has stopped it: ``with changes, changes`` exits twice, and the
outermost ``Changes`` of the thread also undoes the changes that other ``Changes`` made within its block.
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
    handled: BaseException | None = None  # the exception that was being handled when ``outermost`` was set


_thread = _Thread()


class _Change:
    """A function that undoes a change. ``undo`` calls the function, unless it has already run to its end."""

    def __init__(self, back: Callable[[], None]) -> None:
        self.back, self.undone = back, False

    def undo(self) -> None:
        if not self.undone:
            self.back()
            self.undone = True


class Changes:
    """Makes changes, and undoes them at the end of the block, the last one first. Use it as ``with Changes() as changes, changes:``."""

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
        """Become the outermost changes of this thread, which also undo what other ``Changes`` do within their block. Return True.

        If the thread has outermost changes already, do nothing and return False.
        """
        if _thread.outermost is not None:
            return False
        _thread.outermost, _thread.handled = self, sys.exc_info()[1]
        return True

    def later(self, back: Callable[[], None]) -> None:
        """Call ``back`` at the end of the block, and again if an interrupt stopped that call."""
        change = _Change(back)
        if _thread.outermost is not None and _thread.outermost is not self:
            _thread.outermost._made.append(change)
        self._made.append(change)

    def keep(self, place: Any, name: str) -> None:
        """At the end of the block, restore the present value of an attribute of an object, or of an entry of a dict."""
        self.later(partial(_put_back, place, name, there(place, name)))

    def put(self, place: Any, name: str, value: Any) -> None:
        """Until the end of the block, replace the value of an attribute of an object, or of an entry of a dict."""
        self.keep(place, name)
        if isinstance(place, dict):
            place[name] = value
        else:
            setattr(place, name, value)


def raise_interrupt(error: BaseException | None) -> None:
    """Raise the interrupt that led to an error, if there is one.

    An interrupt may make a context manager of torch raise an error while it exits; the error would hide the interrupt.
    """
    while error is not None and error is not _thread.handled:
        # graphreg's own BaseExceptions are no interrupts; they are BaseExceptions so that no forward catches them
        is_ours = type(error).__module__.startswith("graphreg.")
        if not is_ours and not isinstance(error, (Exception, GeneratorExit)):
            raise error
        error = error.__context__


def there(place: Any, name: str) -> Any:
    """Return an attribute of the object ``place`` itself (not of its class), or an entry of a dict; ``_MISSING`` if there is none."""
    return (place if isinstance(place, dict) else vars(place)).get(name, _MISSING)


def _put_back(place: Any, name: str, before: Any) -> None:
    if there(place, name) is before:
        return
    if isinstance(place, dict):
        place.pop(name) if before is _MISSING else place.update({name: before})
    else:
        delattr(place, name) if before is _MISSING else setattr(place, name, before)


def outermost() -> Changes | None:
    """Return the outermost changes of this thread (see ``Changes.outermost``); None if there are none."""
    return _thread.outermost


def _end_blocks(trace: TracebackType | None) -> None:
    """Exit the context managers of ``contextlib`` that an interrupt stopped in their ``__enter__`` or ``__exit__``.

    Otherwise each would exit when its generator is freed. That may be much later, because the traceback of the interrupt refers to it.
    """
    while trace is not None:
        frame, trace = trace.tb_frame, trace.tb_next
        block = frame.f_locals.get("self") if frame.f_code.co_filename == contextlib.__file__ else None
        if isinstance(block, contextlib.ExitStack) and vars(block):  # it has no attributes if the interrupt came in ``__init__``
            block.close()
        generator = getattr(block, "gen", None)
        if isinstance(generator, GeneratorType) and not generator.gi_running:
            generator.close()
