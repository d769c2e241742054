"""Takes back what a call has counted or replaced if the call raises: a call that did not finish does not count.

A rewritten module, and a model that is regularized in place, begin and end each of their calls here. Whatever counts a call, or replaces
something that the next call reads, tells how to take that back (``counted``). Each function that takes back does so only if nobody has
counted since: another thread may have begun a call, and numbers that are taken stay taken.

Compiled code assigns what it counts when its graph has run, so it has nothing to take back.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from graphreg.torch_internals.dynamo_marks import disable

Back = Callable[[], None]


class _RunningCall(threading.local):
    """``call``: what the call that runs in this thread has counted, as functions that take it back; None if no call runs."""

    call: list[Back] | None = None


running = _RunningCall()


@disable()
def begin_counting() -> list[Back] | None:
    """Begin a call in this thread; return the argument for ``end_counting``."""
    outer, running.call = running.call, []
    return outer


@disable()
def end_counting(outer: list[Back] | None, as_part: bool = False) -> None:
    """End the call that runs. ``as_part``: whether it is a part of the call around it, so that what it counted is taken back with that."""
    if as_part and outer is not None and running.call:
        outer += running.call
    running.call = outer


@disable()
def take_back() -> None:
    """Take back what the call that runs has counted, the last first."""
    while running.call:
        running.call.pop()()


def counted(back: Back) -> None:
    """Record that the call that runs in this thread has counted something. ``back``: takes it back."""
    if running.call is not None:
        running.call.append(back)
