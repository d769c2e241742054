"""Reads the grad and autocast modes, detects random draws, and restores the random generators. A graph records none of this state.

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
# torch's own functions: while graphreg traces, it answers what a forward asks through ``torch``, which takes longer.
_grad, _inference = torch.is_grad_enabled, torch.is_inference_mode_enabled
_autocast, _dtype = torch.is_autocast_enabled, torch.get_autocast_dtype


def regions() -> tuple[Any, ...]:
    """Return whether grad and inference mode are on, to which dtypes CPU and CUDA autocast (or None), and the hooks on saved tensors."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return _grad(), _inference(), _dtype("cpu") if _autocast("cpu") else None, _dtype("cuda") if _autocast("cuda") else None, hooks


class _ThreadDraws(threading.local):
    """Counts of a thread's draws and seedings. In each pair, the first entry is for Python's generator, the second for torch's.

    Attributes:
        watched: Whether the thread's draws are being counted.
        draws: The number of the thread's draws that were counted.
        seeds: The number of the thread's seedings of torch's generator that were counted.
        seeds_at_state: For each state of torch's generator that the thread has read, the value of ``seeds`` at that time. When the thread
            sets the generator to that state again, ``seeds`` returns to this value. None while seedings are not counted.
        in_doubt: Whether a generator has changed while draws were not counted, so that any thread may have drawn. None except during the
            first, uncounted call in ``with_draws_restored``.
    """

    watched = (False, False)
    draws = (0, 0)
    seeds = 0
    seeds_at_state: dict[bytes, int] | None = None
    in_doubt: bool | None = None


_thread = _ThreadDraws()


@dataclass(frozen=True, eq=False)
class Randomness:
    """A record of the present states of Python's and torch's generators, and of this thread's counts (see ``_ThreadDraws``).

    The counts are needed because all threads share the generators: a changed state does not show which thread has drawn. Two records are
    equal if, between them, this thread has drawn from neither generator, and has not seeded torch's generator.
    """

    states: tuple[Any, bytes]
    watched: tuple[bool, bool]
    draws: tuple[int, int]
    seeds: int

    def changed(self, now: Randomness) -> list[bool]:
        """Return, for Python's generator and torch's, whether draws of this thread changed that generator between this record and ``now``.

        If draws were not counted, every change of a generator counts as a draw of this thread.
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
    """Return a record of the present states of the generators. Two records differ if this thread has drawn in between."""
    with without_functions():  # the tracer calls this while a function mode records the forward; the mode must not see these calls
        return Randomness((random.getstate(), torch.get_rng_state().numpy().tobytes()), _thread.watched, _thread.draws, _thread.seeds)


def restore_randomness(state: Randomness) -> None:
    """Set the generators back to an earlier state if this thread has drawn from them since."""
    python, torchs = state.changed(randomness())
    _thread.seeds = state.seeds
    if _thread.in_doubt is not None:  # another thread may have drawn; if so, with_draws_restored makes a second call, which restores
        return
    if python:
        random.setstate(state.states[0])
    if torchs:
        torch.set_rng_state(torch.frombuffer(bytearray(state.states[1]), dtype=torch.uint8))


def may_be_anothers() -> bool:
    """Return whether a draw that was found may be another thread's: then what runs now is discarded and run again, with a count."""
    return bool(_thread.in_doubt)


class _Draws(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts this thread's operations that draw from torch's default generators. A dispatch mode acts in one thread only."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags and not (kwargs or {}).get("generator"):
            python, torchs = _thread.draws
            _thread.draws = (python, torchs + 1)
        return func(*args, **(kwargs or {}))


def _drawn(frame: Any, event: str, function: Any) -> None:
    """Count a call in this thread if the call draws from Python's generator or seeds it. A profile function (see ``sys.setprofile``).

    Every function of the module ``random`` that draws or seeds calls a C method of the module's generator.
    """
    is_draw = event == "c_call" and getattr(function, "__self__", None) is random._inst
    if is_draw and function.__name__ != "getstate":
        python, torchs = _thread.draws
        _thread.draws = (python + 1, torchs)


class _WatchedGenerator:
    """Replaces torch's default generator in ``torch.random``. Calls ``seeded`` before ``torch.manual_seed`` or ``torch.seed`` seeds it."""

    def __init__(self, generator: Any, seeded: Callable[[], None]) -> None:
        self._generator, self._seeded = generator, seeded

    def __getattr__(self, name: str) -> Any:
        if name in ("manual_seed", "seed"):
            self._seeded()
        return getattr(self._generator, name)


class _CountingGenerator(_WatchedGenerator):
    """Counts how often each thread seeds torch's default generator.

    Seedings in a block of ``torch.random.fork_rng`` do not count, because the block restores the state of the generator.
    """

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
        # a state that this thread has read before, as at the end of ``fork_rng``, takes seedings back
        _thread.seeds = (_thread.seeds_at_state or {}).get(self._state_bytes(), _thread.seeds)

    def _state_bytes(self) -> bytes:
        """Return the state of the generator, read while all modes are off. Under a tracer's mode, the state's tensor might have no data."""
        with without_functions(), _disable_current_modes():
            return bytes(self._generator.get_state().numpy().tobytes())


def on_seeding(changes: Changes, seeded: Callable[[], None]) -> None:
    """Call ``seeded`` before a function of torch.random seeds the default generator, until the block of ``changes`` ends.

    torch's modes do not see a call of ``torch.manual_seed``. So a watched generator replaces the default generator. ``torch.manual_seed``
    looks up the generator in its module at each call, so this also works for code that has imported ``torch.manual_seed`` before.
    """
    changes.put(torch.random, "default_generator", _WatchedGenerator(vars(torch.random)["default_generator"], seeded))


def _seeded() -> None:
    python, torchs = _thread.draws
    _thread.draws, _thread.seeds = (python, torchs + 1), _thread.seeds + 1


def with_draws_restored(function: Callable[[], _T]) -> _T:
    """Call a function, then set the generators back if this thread has drawn from them. Return the function's result.

    All threads share the generators. If other threads run, a count of draws is necessary in order to tell the draws of this thread from
    those of other threads. But Python code takes twice as long while draws are counted. So the function is first called without counting.
    If no generator has changed during this call, its result is returned. If a generator has changed, the result is discarded, and the
    function is called again with counting. So the function itself may compare records of ``randomness()``: in the call whose result is
    returned, draws of other threads do not make two records differ.
    """
    before = randomness()
    with Changes() as changes, changes:
        changes.later(lambda: restore_randomness(before))
        if _thread.seeds_at_state is not None or threading.active_count() == 1:
            with _seeds_counted():
                if threading.active_count() == 1:
                    random.random()  # so that the state changes even if the function seeds with the user's latest seed
                return function()
        if (first := _called_uncounted(function, before)) is not None:
            return first[0]
        with draws_watched():
            before = replace(before, watched=_thread.watched, draws=_thread.draws)
            return function()


def _called_uncounted(function: Callable[[], _T], before: Randomness) -> tuple[_T] | None:
    """Call a function without counting draws. Return ``(result,)``, or None if a generator has changed: any thread may have drawn."""
    with Changes() as changes, changes:
        changes.later(partial(setattr, _thread, "in_doubt", None))
        _thread.in_doubt = False
        try:
            with _seeds_counted():
                result = function()
        except Exception as error:
            raise_interrupt(error)
            before.changed(randomness())
            # in doubt, the function runs again, and an error that it then raises counts
            if not _thread.in_doubt:
                raise
            return None
        before.changed(randomness())
        return None if _thread.in_doubt else (result,)


@contextmanager
def draws_watched() -> Iterator[None]:
    """Open a block in which this thread's draws and seedings are counted. Python code takes twice as long in the block.

    If the thread already has a profile function, draws from Python's generator are not counted.
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
    """Open a block in which this thread's seedings of torch's default generator are counted."""
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
    """Open a block in which one of torch's loggers logs nothing below ``level`` for this thread.

    The logger would log long tracebacks of errors that torch raises anyway.
    """
    log, thread = logging.getLogger(logger), threading.get_ident()

    def passes(record: logging.LogRecord) -> bool:
        return record.levelno >= level or threading.get_ident() != thread

    with Changes() as changes, changes:
        changes.later(partial(log.removeFilter, passes))
        log.addFilter(passes)
        yield


class ModuleStack(OrderedDict[str, Any]):
    """Replaces the dict in which a torch.fx tracer records the running module calls, because its ``copy.copy`` is faster.

    torch.fx copies the dict for each node, and ``copy.copy`` of an ``OrderedDict`` is slow.
    """

    def __copy__(self) -> OrderedDict[str, Any]:
        return OrderedDict(self)
