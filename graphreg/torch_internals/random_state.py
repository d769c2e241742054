"""What surrounds a forward and a trace would lose: grad and autocast regions, and the states of generators."""

from __future__ import annotations

import logging
import random
import sys
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from graphreg.torch_internals.patching import Changes


def regions() -> tuple[bool, ...]:
    """What surrounds the code that runs now and changes what its operations do."""
    on = torch.is_autocast_enabled
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), on("cpu"), on("cuda")


class _Thread(threading.local):
    """How often a thread drew from Python's and torch's generators, as far as it was watched."""

    watched = (False, False)
    draws = (0, 0)


_thread = _Thread()


@dataclass(frozen=True, eq=False)
class Randomness:
    """The states of Python's and torch's generators, and what was seen of this thread: the generators belong to all threads."""

    states: tuple[Any, bytes]
    watched: tuple[bool, bool]
    draws: tuple[int, int]

    def changed(self, now: Randomness) -> list[bool]:
        """Of Python's and of torch's generator, whether this thread has drawn from it since."""
        pairs = zip(self.states, now.states, self.watched, self.draws, now.draws, strict=True)
        return [before != after and not (watched and drew == drawn) for before, after, watched, drew, drawn in pairs]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Randomness) and not any(other.changed(self))

    def __hash__(self) -> int:
        return hash(self.states[1])


def randomness() -> Randomness:
    """Where the generators stand now; unequal to where they stood before if this thread has drawn since."""
    with torch._C.DisableTorchFunction():  # it may be asked in the midst of a forward that is recorded
        return Randomness((random.getstate(), torch.get_rng_state().numpy().tobytes()), _thread.watched, _thread.draws)


def restore_randomness(state: Randomness) -> None:
    """Put back what this thread has drawn."""
    python, torchs = state.changed(randomness())
    if python:
        random.setstate(state.states[0])
    if torchs:
        torch.set_rng_state(torch.frombuffer(bytearray(state.states[1]), dtype=torch.uint8))


class _Draws(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operations of this thread that draw from torch's own generators; a mode is one thread's."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags and not (kwargs or {}).get("generator"):
            python, torchs = _thread.draws
            _thread.draws = (python, torchs + 1)
        return func(*args, **(kwargs or {}))


def _drawn(frame: Any, event: str, function: Any) -> None:
    """Python tells of each call in one thread: of those, the methods of ``random`` that are C's, where all of its draws end."""
    own = event == "c_call" and getattr(function, "__self__", None) is random._inst
    if own and function.__name__ != "getstate":
        python, torchs = _thread.draws
        _thread.draws = (python + 1, torchs)


@contextmanager
def draws_watched() -> Iterator[None]:
    """Tell the draws of this thread from those of others, where there are others: it costs some time."""
    if threading.active_count() == 1 or any(_thread.watched):
        yield
        return
    free = sys.getprofile() is None
    with Changes() as changes, changes:
        changes.later(partial(setattr, _thread, "watched", _thread.watched))
        _thread.watched = (free, True)
        if free:
            changes.later(partial(sys.setprofile, None))
            sys.setprofile(_drawn)
        with _Draws():  # type: ignore[no-untyped-call]
            yield


@contextmanager
def quiet(logger: str, level: int = logging.ERROR) -> Iterator[None]:
    """Without what one of torch's loggers says below ``level``, a screen of tracebacks, where the error that is raised says enough."""
    log = logging.getLogger(logger)
    with Changes() as changes, changes:
        changes.later(partial(log.setLevel, log.level))
        log.setLevel(level)
        yield


class ModuleStack(OrderedDict[str, Any]):
    """The modules that surround a call; fx copies it for each node, and ``copy.copy`` goes a long way round with its type."""

    def __copy__(self) -> OrderedDict[str, Any]:
        return OrderedDict(self)
