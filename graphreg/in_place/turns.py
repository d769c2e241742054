"""Who may do what when several threads call a model in place: calls run side by side, but none of them beside a trace of the model.

A trace puts the model into the state in which it was before ``regularize_``: for that time it has its own class, and its blocks theirs. A
call in another thread would then run the plain forward. So a trace waits until no other thread is in a call of this model, and calls wait
until the trace has ended.

A thread that waits here is *parked*. A trace does not wait for parked threads: nothing of the model runs in them, and they go on only when
the trace has ended. So two threads that both want to trace, each within a call, do not wait for each other.
"""

from __future__ import annotations

import os
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import get_ident
from typing import Any

from torch import nn

from graphreg.ir.module_record import RESTS
from graphreg.torch_internals.dynamo_marks import disable
from graphreg.torch_internals.other_threads import is_compiling, parked


class _Turns:
    """What the threads do. One trace runs at a time, of whatever model, because a trace changes global state of torch.

    Attributes:
        changed: Notified when a thread that waits may go on. Its lock is held for microseconds.
        lock: The lock of ``changed``.
        inside: For each thread, the states of the models (``Placed``) of whose calls it is in the midst.
        parked: The threads that wait.
        wanted: The models that threads wait to trace.
        tracing: The thread that traces, and the model; None if none does.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.changed = threading.Condition(self.lock)
        self.inside: dict[int, list[Any]] = {}
        self.parked: set[int] = set()
        self.wanted: list[Any] = []
        self.tracing: tuple[int, Any] | None = None

    def must_wait(self, model: Any, mine: list[Any]) -> bool:
        """Whether this thread, which is in calls of the models ``mine``, may not begin a call of ``model`` now."""
        if self.tracing is not None and self.tracing[0] != get_ident() and any(each is self.tracing[1] for each in (model, *mine)):
            return True
        # A trace that waits comes first, or calls that overlap might keep it waiting for ever. But
        # it waits for the calls that run already, so a call within one of these goes on.
        return any(each is model for each in self.wanted) and all(each is not model for each in mine)

    def may_trace(self, model: Any) -> bool:
        others = (thread for thread, models in self.inside.items() if thread != get_ident() and any(each is model for each in models))
        return self.tracing is None and self.parked.issuperset(others)


class _TurnsNow:
    turns = _Turns()


def _renew() -> None:
    _TurnsNow.turns = _Turns()  # in a forked child, none of the other threads exists


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)


@disable()
def begin_turn(model: Any) -> None:
    """Begin a call of a model, when no other thread traces the model or waits to do so. ``model``: its state, a ``Placed``."""
    turns = _TurnsNow.turns
    with turns.lock:
        mine = turns.inside.setdefault(get_ident(), [])
        # Most calls take this lock, and wait for nothing.
        if turns.tracing is not None or turns.wanted:
            _wait(turns, lambda: not turns.must_wait(model, mine))
        mine.append(model)


@disable()
def end_turn() -> None:
    """End the call that this thread began last."""
    turns = _TurnsNow.turns
    with turns.lock:
        if mine := turns.inside.get(get_ident()):  # None in a child that was forked within the call
            mine.pop()
        if not mine:
            turns.inside.pop(get_ident(), None)
        if turns.parked:
            turns.changed.notify_all()


@contextmanager
def tracing_turn(model: Any) -> Iterator[None]:
    """Within the context, no other thread traces, and no other thread runs a call of ``model``."""
    turns, me = _TurnsNow.turns, get_ident()
    with turns.lock:
        before = turns.tracing
        # Else this is a trace within a trace of the same thread, whose turn it is.
        if before is None or before[0] != me:
            turns.wanted.append(model)
            try:
                _wait(turns, lambda: turns.may_trace(model))
            finally:
                turns.wanted.remove(model)
            before = None
        turns.tracing = me, model
    try:
        yield
    finally:
        with turns.lock:
            turns.tracing = before
            turns.changed.notify_all()


def wait_for_trace() -> None:
    """Wait until no other thread traces a model."""
    turns = _TurnsNow.turns
    with turns.lock:
        _wait(turns, lambda: turns.tracing is None or turns.tracing[0] == get_ident())


def graphreg_traces_here() -> bool:
    """Return whether this thread traces a model."""
    tracing = _TurnsNow.turns.tracing
    return tracing is not None and tracing[0] == get_ident()


def _wait(turns: _Turns, ready: Callable[[], bool]) -> None:
    """Park this thread until ``ready()``. The caller holds the lock."""
    if ready():
        return
    me = get_ident()
    turns.parked.add(me)
    turns.changed.notify_all()  # a trace may have waited for this thread
    try:
        with parked():
            turns.changed.wait_for(ready)
    finally:
        turns.parked.discard(me)


def resting_class(kind: type[nn.Module], original: type[nn.Module]) -> type[nn.Module]:
    """Return the class that a model has during a trace: like its own class, ``original``, but calls in other threads wait for the end.

    ``kind``: the class that ``regularize_`` generated for the model.
    """
    if (made := vars(kind).get(RESTING)) is None:

        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            if is_compiling() or graphreg_traces_here():
                return original.__call__(self, *args, **kwargs)
            wait_for_trace()
            return self(*args, **kwargs)

        call.__name__ = "__call__"
        members = {"__call__": call, RESTS: original}
        members |= {name: getattr(original, name) for name in ("__module__", "__qualname__", "__doc__")}
        made = types.new_class(original.__name__, (original,), exec_body=lambda space: space.update(members))
        setattr(kind, RESTING, made)
    return made


RESTING = "graphreg_resting"  # the name of the attribute of a generated class that has its resting class
