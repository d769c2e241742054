"""Functions for global state that a graph does not record: they read the grad and autocast modes, and restore the random generators.

The file also has two helpers for tracing: ``quiet`` and ``ModuleStack``.
"""

from __future__ import annotations

import logging
import random
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from graphreg.torch_internals.patching import Changes, raise_interrupt
from graphreg.torch_internals.torch_modes import without_functions

_T = TypeVar("_T")


def regions() -> tuple[bool, ...]:
    """Return which of the modes that change operations are on, as (grad, inference, autocast on CPU, autocast on CUDA)."""
    on = torch.is_autocast_enabled
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), on("cpu"), on("cuda")


class _Thread(threading.local):
    """The draws and seeds of a thread. In a pair, the first is for Python's generator, the second for torch's.

    Attributes:
        watched: Whether the thread's draws are counted now.
        draws: How often the thread drew while they were counted.
        seeds: How often the thread has seeded torch's generator.
        seeds_at_state: For each state of torch's generator that the thread has read, the value of ``seeds`` at that time. When the thread
            sets that state again, ``seeds`` gets this value again. None if seeds are not counted now.
        in_doubt: Whether a generator was seen to change while draws were not counted and other threads ran, so that it is not known which
            thread drew. None except during the first call in ``with_draws_restored``.
    """

    watched = (False, False)
    draws = (0, 0)
    seeds = 0
    seeds_at_state: dict[bytes, int] | None = None
    in_doubt: bool | None = None


_thread = _Thread()


@dataclass(frozen=True, eq=False)
class Randomness:
    """The states of Python's and torch's generators, and the counts of this thread (``_Thread``).

    The counts are needed because all threads share the generators. Two records are equal if this thread has neither drawn nor seeded
    torch's generator between them.
    """

    states: tuple[Any, bytes]
    watched: tuple[bool, bool]
    draws: tuple[int, int]
    seeds: int

    def changed(self, now: Randomness) -> list[bool]:
        """Return, for Python's and for torch's generator, whether this thread's draws changed it between this record and ``now``.

        If draws were not counted, every change is attributed to this thread.
        """
        pairs = zip(self.states, now.states, self.watched, self.draws, now.draws, strict=True)
        found = [before != after and not (watched and drew == drawn) for before, after, watched, drew, drawn in pairs]
        if _thread.in_doubt is not None and any(found):
            _thread.in_doubt = True
        return found

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Randomness) and self.seeds == other.seeds and not any(other.changed(self))

    def __hash__(self) -> int:
        return hash(self.states[1])


def randomness() -> Randomness:
    """Return the present state of the generators. Two such states differ if this thread has drawn in between."""
    with without_functions():  # because a forward that is being recorded may call this
        return Randomness((random.getstate(), torch.get_rng_state().numpy().tobytes()), _thread.watched, _thread.draws, _thread.seeds)


def restore_randomness(state: Randomness) -> None:
    """Set the generators back to an earlier state if this thread has drawn from them since."""
    python, torchs = state.changed(randomness())
    _thread.seeds = state.seeds
    if _thread.in_doubt is not None:  # other threads may have drawn; with_draws_restored then calls again, and restores in that call
        return
    if python:
        random.setstate(state.states[0])
    if torchs:
        torch.set_rng_state(torch.frombuffer(bytearray(state.states[1]), dtype=torch.uint8))


class _Draws(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts this thread's operations that draw from torch's default generators. A dispatch mode acts in one thread only."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags and not (kwargs or {}).get("generator"):
            python, torchs = _thread.draws
            _thread.draws = (python, torchs + 1)
        return func(*args, **(kwargs or {}))


def _drawn(frame: Any, event: str, function: Any) -> None:
    """Count the call if it draws from Python's generator. Python calls this function at each call in the thread (``sys.setprofile``).

    Every function of ``random`` that draws calls a C method of the module's generator.
    """
    is_draw = event == "c_call" and getattr(function, "__self__", None) is random._inst
    if is_draw and function.__name__ != "getstate":
        python, torchs = _thread.draws
        _thread.draws = (python + 1, torchs)


class _WatchedGenerator:
    """Replaces torch's default generator for ``torch.manual_seed`` and the like, and calls ``seeded`` before the generator is seeded."""

    def __init__(self, generator: Any, seeded: Callable[[], None]) -> None:
        self._generator, self._seeded = generator, seeded

    def __getattr__(self, name: str) -> Any:
        if name in ("manual_seed", "seed"):
            self._seeded()
        return getattr(self._generator, name)


class _CountingGenerator(_WatchedGenerator):
    """Counts the seeds of each thread. A block of ``torch.random.fork_rng`` restores the state, so its seeds do not count."""

    def __init__(self, generator: Any) -> None:
        super().__init__(generator, _seeded)

    def get_state(self) -> torch.Tensor:
        if _thread.seeds_at_state is not None:
            _thread.seeds_at_state[self._state_bytes()] = _thread.seeds
        state: torch.Tensor = self._generator.get_state()
        return state

    def set_state(self, state: torch.Tensor) -> None:
        _seeded()
        self._generator.set_state(state)
        _thread.seeds = (_thread.seeds_at_state or {}).get(self._state_bytes(), _thread.seeds)

    def _state_bytes(self) -> bytes:
        """Return the state of the generator, read outside of all modes. Under a mode that records, its tensor might have no data."""
        with without_functions(), _disable_current_modes():
            return bytes(self._generator.get_state().numpy().tobytes())


def on_seeding(changes: Changes, seeded: Callable[[], None]) -> None:
    """Until the block of ``changes`` ends, call ``seeded`` before a function of torch.random seeds the default generator.

    ``torch.manual_seed`` looks up the generator in its module at each call, so code that has imported ``torch.manual_seed`` is covered,
    too. torch's modes do not see such a call.
    """
    changes.put(torch.random, "default_generator", _WatchedGenerator(vars(torch.random)["default_generator"], seeded))


def _seeded() -> None:
    python, torchs = _thread.draws
    _thread.draws, _thread.seeds = (python, torchs + 1), _thread.seeds + 1


def with_draws_restored(function: Callable[[], _T]) -> _T:
    """Call a function, then set the generators back if this thread has drawn from them. Return what the function returns.

    Within the call, ``randomness`` distinguishes the draws of this thread from those of others. All threads share the generators. So if
    other threads run, this thread's draws must be counted, which makes Python code take twice as long. Therefore the function is first
    called without counting. Only if a generator has changed in the meantime, the result is discarded, and the function is called
    again, with counting.
    """
    before = randomness()
    with Changes() as changes, changes:
        changes.later(lambda: restore_randomness(before))
        if _thread.seeds_at_state is not None or threading.active_count() == 1:
            with _seeds_counted():
                if threading.active_count() == 1:
                    random.random()  # so that the state changes even if the function seeds with the seed that the user set last
                return function()
        if (first := _called_uncounted(function, before)) is not None:
            return first[0]
        with draws_watched():
            before = replace(before, watched=_thread.watched, draws=_thread.draws)
            return function()


def _called_uncounted(function: Callable[[], _T], before: Randomness) -> tuple[_T] | None:
    """Call a function without counting draws. Return (result,), or None if a generator has changed, because any thread may have drawn."""
    with Changes() as changes, changes:
        changes.later(partial(setattr, _thread, "in_doubt", None))
        _thread.in_doubt = False
        try:
            with _seeds_counted():
                result = function()
        except Exception as error:
            raise_interrupt(error)
            before.changed(randomness())
            if not _thread.in_doubt:
                raise
            return None
        before.changed(randomness())
        return None if _thread.in_doubt else (result,)


@contextmanager
def draws_watched() -> Iterator[None]:
    """Count this thread's seeds and draws in a block. Python code takes twice as long in it.

    Draws from Python's generator are not counted if the thread already has a profile function.
    """
    free = sys.getprofile() is None
    with _seeds_counted(), Changes() as changes, changes:
        changes.later(partial(setattr, _thread, "watched", _thread.watched))
        _thread.watched = (free, True)
        if free:
            changes.later(partial(sys.setprofile, None))
            sys.setprofile(_drawn)
        with _Draws():  # type: ignore[no-untyped-call]
            yield


@contextmanager
def _seeds_counted() -> Iterator[None]:
    """Count this thread's seeds in a block."""
    if _thread.seeds_at_state is not None:
        yield
        return
    with Changes() as changes, changes:
        changes.later(partial(setattr, _thread, "seeds_at_state", None))
        _thread.seeds_at_state = {}
        changes.put(torch.random, "default_generator", _CountingGenerator(vars(torch.random)["default_generator"]))
        yield


@contextmanager
def quiet(logger: str, level: int = logging.ERROR) -> Iterator[None]:
    """Silence one of torch's loggers below ``level`` in a block: it would log long tracebacks of errors that are raised anyway."""
    log = logging.getLogger(logger)
    with Changes() as changes, changes:
        changes.later(partial(log.setLevel, log.level))
        log.setLevel(level)
        yield


class ModuleStack(OrderedDict[str, Any]):
    """torch.fx's record of the modules around a call. torch.fx copies it for each node, and ``copy.copy`` of an ``OrderedDict`` is slow."""

    def __copy__(self) -> OrderedDict[str, Any]:
        return OrderedDict(self)
