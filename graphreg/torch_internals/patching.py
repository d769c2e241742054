"""Makes temporary changes of attributes and dict entries, and undoes them at the end of a ``with`` block, even after an interrupt.

An interrupt (such as ``KeyboardInterrupt``) may come between any two steps of Python, even while Python enters or leaves the block. So
``Changes`` records each change before it makes the change. An interrupt may also stop the undoing. There are two remedies:

- ``with changes, changes`` calls ``__exit__`` twice.
- The outermost ``Changes`` of a thread also undoes the changes that other ``Changes`` made within its block.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
import threading
from collections.abc import Callable, Iterable
from functools import partial
from types import CodeType, FunctionType, GeneratorType, ModuleType, TracebackType
from typing import Any

_MISSING = object()
_PLAIN = frozenset((bool, int, float, str, type(None), tuple, dict))


class _CurrentChanges(threading.local):
    outermost: Changes | None = None
    handled: BaseException | None = None  # the exception that was being handled when ``outermost`` was set


_thread = _CurrentChanges()
wrappers: set[CodeType] = set()  # the code of functions by which a tracer replaces others while it traces: their ``__wrapped__``


class _Change:
    """A change that can be undone. ``undo`` calls ``back``, which undoes the change, unless ``back`` has already run to its end."""

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
        self._replaced: list[tuple[Any, Any]] = []  # objects, and what they stand in for
        self._imported = len(sys.modules)
        self._raised = False

    def __enter__(self) -> Changes:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        outermost = _thread.outermost is self
        self._raised = self._raised or kind is not None
        if outermost:
            _end_blocks(trace)
        for change in reversed(self._made):
            change.undo()
        if self._replaced and len(sys.modules) > self._imported:
            self._put_back_imported()
        if outermost:
            _thread.outermost = None
            if isinstance(error, Exception):
                raise_interrupt(error)

    def outermost(self) -> bool:
        """Make this object the outermost ``Changes`` of the thread, and return True.

        The outermost ``Changes`` also undoes the changes that other ``Changes`` make within its block. If the thread already has an
        outermost ``Changes``, do nothing and return False.
        """
        if _thread.outermost is not None:
            return False
        _thread.outermost, _thread.handled = self, sys.exc_info()[1]
        return True

    def later(self, back: Callable[[], None]) -> None:
        """Call ``back`` at the end of the block. If an interrupt stops this call, call ``back`` again."""
        change = _Change(back)
        if _thread.outermost is not None and _thread.outermost is not self:
            _thread.outermost._made.append(change)
        self._made.append(change)

    def if_raised(self, back: Callable[[], None]) -> None:
        """Call ``back`` at the end of the block if an exception ends it."""

        def back_if_raised() -> None:
            if self._raised:
                back()

        self.later(back_if_raised)

    def keep(self, place: Any, name: str) -> None:
        """Restore the present value of an attribute or a dict entry at the end of the block. ``place``: the object or the dict."""
        self.later(put_back(place, name))

    def put(self, place: Any, name: str, value: Any) -> None:
        """Replace the value of an attribute or a dict entry until the end of the block. ``place``: the object or the dict."""
        before = there(place, name)
        self.later(partial(_put_back, place, name, before))
        if before is not _MISSING and type(value) not in _PLAIN:
            self.stands_in(value, before)
        if isinstance(place, dict):
            place[name] = value
        else:
            setattr(place, name, value)

    def stands_in(self, value: Any, before: Any) -> None:
        """Note what stands in for what: a Python module that is imported within the block may take it."""
        self._replaced.append((value, before))

    def put_into(self, places: Iterable[dict[str, Any]], name: str, value: Any) -> None:
        """Give each dict that has no entry ``name`` this value until the end of the block. One change does it for all: they may be many."""
        without = [place for place in places if name not in place]

        def back() -> None:
            for place in without:
                if place.get(name) is value:
                    del place[name]

        self.later(back)
        for place in without:
            place[name] = value

    def _put_back_imported(self) -> None:
        """Put back what Python modules hold that were imported within the block: ``from torch import zeros`` took what stood there."""
        replaced = {id(value): (value, before) for value, before in reversed(self._replaced)}
        for module in list(itertools.islice(reversed(sys.modules.values()), len(sys.modules) - self._imported)):
            for name, value in list(vars(module).items() if isinstance(module, ModuleType) else ()):
                if id(value) in replaced:
                    vars(module)[name] = replaced[id(value)][1]
                elif type(value) is FunctionType and value.__code__ in wrappers:
                    vars(module)[name] = value.__wrapped__  # type: ignore[attr-defined]


def raise_interrupt(error: BaseException | None) -> None:
    """Raise the interrupt that led to ``error``, if there is one.

    After an interrupt, a context manager of torch may raise an error while it exits. This error would hide the interrupt.
    """
    while error is not None and error is not _thread.handled:
        # A BaseException of graphreg's own is not an interrupt. It is a BaseException so that no forward catches it.
        is_ours = type(error).__module__.startswith("graphreg.")
        if not is_ours and not isinstance(error, (Exception, GeneratorExit)):
            raise error
        error = error.__context__


def put_back(place: Any, name: str) -> Callable[[], None]:
    """Return a function that restores the present value of an attribute or a dict entry."""
    return partial(_put_back, place, name, there(place, name))


def there(place: Any, name: str) -> Any:
    """Return the entry ``name`` of a dict, or of the ``__dict__`` of an object; ``_MISSING`` if there is no such entry.

    A function's code is no entry, but an attribute.
    """
    if name == "__code__":
        return place.__code__
    return (place if isinstance(place, dict) else vars(place)).get(name, _MISSING)


def _put_back(place: Any, name: str, before: Any) -> None:
    if there(place, name) is before:
        return
    if isinstance(place, dict):
        place.pop(name) if before is _MISSING else place.update({name: before})
    else:
        delattr(place, name) if before is _MISSING else setattr(place, name, before)


def outermost() -> Changes | None:
    """Return the outermost ``Changes`` of this thread (see ``Changes.outermost``); None if the thread has none."""
    return _thread.outermost


def _end_blocks(trace: TracebackType | None) -> None:
    """Exit the context managers of ``contextlib`` that an interrupt stopped in their ``__enter__`` or ``__exit__``.

    Otherwise each of these context managers would exit only when Python frees its generator. This may happen much later, because the
    traceback of the interrupt refers to the generator.
    """
    while trace is not None:
        frame, trace = trace.tb_frame, trace.tb_next
        block = frame.f_locals.get("self") if frame.f_code.co_filename == contextlib.__file__ else None
        if isinstance(block, contextlib.ExitStack) and vars(block):  # a stack interrupted in ``__init__`` has no attributes
            block.close()
        generator = getattr(block, "gen", None)
        if isinstance(generator, GeneratorType) and not generator.gi_running:
            generator.close()
