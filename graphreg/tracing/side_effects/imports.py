"""Notices what a forward imports for the first time while it is traced, so that this is searched like what was imported before."""

from __future__ import annotations

import builtins
import importlib
import sys
import threading
from collections.abc import Callable
from itertools import islice
from typing import Any

from graphreg.torch_internals.patching import Changes
from graphreg.tracing.side_effects.reachable_state import is_foreign_name


def follow_imports(changes: Changes, follow: Callable[[], None]) -> None:
    """Call ``follow`` when this thread has imported Python modules that may be part of a model, until ``changes`` ends.

    A module that imports others is loaded to its end before: what it changes in them is no state that a call changes.
    """
    thread, within = threading.get_ident(), False

    def following(load: Callable[..., Any]) -> Callable[..., Any]:
        def load_and_follow(*args: Any, **options: Any) -> Any:
            nonlocal within
            if within or threading.get_ident() != thread:
                return load(*args, **options)
            known, within = len(sys.modules), True
            try:
                return load(*args, **options)
            finally:
                within = False
                if not all(map(is_foreign_name, islice(reversed(sys.modules), max(0, len(sys.modules) - known)))):
                    follow()

        return load_and_follow

    changes.put(vars(builtins), "__import__", following(builtins.__import__))
    changes.put(vars(importlib), "import_module", following(importlib.import_module))
