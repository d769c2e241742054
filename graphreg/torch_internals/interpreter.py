"""Python's own interpreter: the garbage collector at rest, room for nested calls, functions with code of their own."""

from __future__ import annotations

import gc
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn

from graphreg.torch_internals.patching import Changes


@contextmanager
def collector_at_rest() -> Iterator[None]:
    """Keeps Python's collector from walking a growing graph again and again, in vain: its nodes are all alive.

    At 100,000 nodes that walk is half of the time. A collector that the user has switched off stays off.
    """
    with Changes() as changes, changes:
        at_rest(changes)
        yield


def at_rest(changes: Changes) -> None:
    """The same, until the changes end."""
    if gc.isenabled():
        changes.later(gc.enable)
        gc.disable()


_FRAMES = 20  # of a module's call while it is traced; torch.export has the most, 14
_CEILING = 50_000  # beyond it C's own stack would end first, and the process with it


def depth(model: nn.Module) -> int:
    """How many modules stand within one another, at most."""
    deepest, waiting, seen = 0, [(model, 1)], dict[nn.Module, int]()
    while waiting:
        module, at = waiting.pop()
        if seen.get(module, 0) >= at or at > _CEILING // _FRAMES:  # a module may hold itself
            continue
        seen[module], deepest = at, max(deepest, at)
        waiting.extend((child, at + 1) for child in module.__dict__.get("_modules", {}).values() if child is not None)
    return deepest


def deep_enough(model: nn.Module, changes: Changes) -> None:
    """Until the changes end: let Python nest as many calls as a trace of the model needs."""
    limit, needed = sys.getrecursionlimit(), depth(model) * _FRAMES
    if needed > limit // 2:  # the other half is for whoever calls, and for what a module does within
        changes.later(partial(sys.setrecursionlimit, limit))
        sys.setrecursionlimit(min(limit + needed, max(limit, _CEILING)))


def with_own_code(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function with a code object of its own: by that Dynamo finds what it compiled, and counts how often.

    A function that is made again and again shares its code object, and past 8 compilations Dynamo gives it up.
    """
    made: Any = function
    return types.FunctionType(made.__code__.replace(), made.__globals__, made.__name__, made.__defaults__, made.__closure__)
