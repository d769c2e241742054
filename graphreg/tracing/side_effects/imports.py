"""Notices what a forward imports for the first time while it is traced, so that this is searched like what was imported before."""

from __future__ import annotations

import builtins
import importlib
import sys
import threading
from collections.abc import Callable
from functools import partial
from itertools import islice
from typing import Any

from graphreg.torch_internals.patching import Changes
from graphreg.tracing.side_effects.reachable_state import is_foreign_name

_lock = threading.Lock()
_followers: list[tuple[int, Callable[[], None]]] = []  # of all threads: the thread, and what to call
_originals: list[tuple[Callable[[], None], Any, Any]] = []  # what puts back what imports outside of these blocks; that and its stand-in
_within = threading.local()


def follow_imports(changes: Changes, follow: Callable[[], None]) -> None:
    """Call ``follow`` when this thread has imported Python modules that may be part of a model, until ``changes`` ends.

    A module that imports others is loaded to its end before: what it changes in them is no state that a call changes. Blocks of several
    threads overlap, so the first of them replaces the functions that import, and the last one puts them back.
    """
    mine = threading.get_ident(), follow

    def leave() -> None:
        with _lock:
            if mine in _followers:
                _followers.remove(mine)
            while _originals and not _followers:
                _originals[-1][0]()
                _originals.pop()

    changes.later(leave)
    with _lock:
        _followers.append(mine)
        if not _originals:
            for place, name in ((vars(builtins), "__import__"), (vars(importlib), "import_module")):
                _originals.append((partial(place.__setitem__, name, place[name]), place[name], following := _following(place[name])))
                place[name] = following
        for _, original, following in _originals:
            changes.stands_in(following, original)


def _following(load: Callable[..., Any]) -> Callable[..., Any]:
    def load_and_follow(*args: Any, **options: Any) -> Any:
        if args and is_foreign_name(args[0]) and not any(args[4:]) and not options:  # as torch does in a function, at each call
            return load(*args)
        mine = [follow for thread, follow in tuple(_followers) if thread == threading.get_ident()]
        if not mine or vars(_within):
            return load(*args, **options)
        known, _within.now = len(sys.modules), True
        try:
            return load(*args, **options)
        finally:
            del _within.now
            if not all(map(is_foreign_name, islice(reversed(sys.modules), max(0, len(sys.modules) - known)))):
                for follow in mine:
                    follow()

    return load_and_follow
