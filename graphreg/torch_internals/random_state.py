"""What surrounds a forward and a trace would lose: grad and autocast regions, and the states of generators."""

from __future__ import annotations

import logging
import random
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from graphreg.torch_internals.patching import Changes


def regions() -> tuple[bool, ...]:
    """What surrounds the code that runs now and changes what its operations do."""
    on = torch.is_autocast_enabled
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), on("cpu"), on("cuda")


class _Thread(threading.local):
    """How often a thread drew from Python's and torch's generators, as far as it was watched, and seeded torch's."""

    watched = (False, False)
    draws = (0, 0)
    seeds = 0
    then: dict[bytes, int] | None = None  # how often it had, by the state that it saw: going back to that undoes the seeds since


_thread = _Thread()


@dataclass(frozen=True, eq=False)
class Randomness:
    """The states of Python's and torch's generators, and what was seen of this thread: the generators belong to all threads."""

    states: tuple[Any, bytes]
    watched: tuple[bool, bool]
    draws: tuple[int, int]
    seeds: int

    def changed(self, now: Randomness) -> list[bool]:
        """Of Python's and of torch's generator, whether this thread has drawn from it since."""
        pairs = zip(self.states, now.states, self.watched, self.draws, now.draws, strict=True)
        return [before != after and not (watched and drew == drawn) for before, after, watched, drew, drawn in pairs]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Randomness) and self.seeds == other.seeds and not any(other.changed(self))

    def __hash__(self) -> int:
        return hash(self.states[1])


def randomness() -> Randomness:
    """Where the generators stand now; unequal to where they stood before if this thread has drawn since."""
    with torch._C.DisableTorchFunction():  # it may be asked in the midst of a forward that is recorded
        return Randomness((random.getstate(), torch.get_rng_state().numpy().tobytes()), _thread.watched, _thread.draws, _thread.seeds)


def stirred() -> None:
    """Draw once by Python: a forward that seeds its generator is not seen if that is as it leaves it, freshly seeded by the same number.

    Not where there are other threads, which draw from it too.
    """
    if threading.active_count() == 1:
        random.random()


def restore_randomness(state: Randomness) -> None:
    """Put back what this thread has drawn."""
    python, torchs = state.changed(randomness())
    _thread.seeds = state.seeds
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
    is_draw = event == "c_call" and getattr(function, "__self__", None) is random._inst
    if is_draw and function.__name__ != "getstate":
        python, torchs = _thread.draws
        _thread.draws = (python + 1, torchs)


class _WatchedGenerator:
    """torch's own generator, as its functions have it (``torch.manual_seed``). It tells who seeds it, and who sets its state."""

    def __init__(self, generator: Any, seeded: Callable[[], None]) -> None:
        self._generator, self._seeded = generator, seeded

    def __getattr__(self, name: str) -> Any:
        if name in ("manual_seed", "seed"):
            self._seeded()
        return getattr(self._generator, name)


class _CountingGenerator(_WatchedGenerator):
    """Counts the seeds of each thread; ``torch.random.fork_rng`` takes its own back."""

    def __init__(self, generator: Any) -> None:
        super().__init__(generator, _seeded)

    def get_state(self) -> torch.Tensor:
        if _thread.then is not None:
            _thread.then[self._state_bytes()] = _thread.seeds
        state: torch.Tensor = self._generator.get_state()
        return state

    def set_state(self, state: torch.Tensor) -> None:
        _seeded()
        self._generator.set_state(state)
        _thread.seeds = (_thread.then or {}).get(self._state_bytes(), _thread.seeds)

    def _state_bytes(self) -> bytes:
        """The state; where it is recorded, too, what torch gives under a mode is a tensor without data."""
        with torch._C.DisableTorchFunction(), _disable_current_modes():
            return bytes(self._generator.get_state().numpy().tobytes())


def on_seeding(changes: Changes, seeded: Callable[[], None]) -> None:
    """Until the changes end: have ``seeded`` called before any code seeds torch's generator, whoever imported ``torch.manual_seed`` before.

    That function looks the generator up in its module at each call, and no mode of torch's is told of it.
    """
    changes.put(torch.random, "default_generator", _WatchedGenerator(vars(torch.random)["default_generator"], seeded))


def _seeded() -> None:
    python, torchs = _thread.draws
    _thread.draws, _thread.seeds = (python, torchs + 1), _thread.seeds + 1


@contextmanager
def draws_watched() -> Iterator[None]:
    """Tell the draws of this thread from those of others, where there are others: it costs some time. Count its seeds anyway."""
    if _thread.then is not None:
        yield
        return
    with Changes() as changes, changes:
        changes.later(partial(setattr, _thread, "then", None))
        _thread.then = {}
        changes.put(torch.random, "default_generator", _CountingGenerator(vars(torch.random)["default_generator"]))
        with _draws_separated() if threading.active_count() > 1 else nullcontext():
            yield


@contextmanager
def _draws_separated() -> Iterator[None]:
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
