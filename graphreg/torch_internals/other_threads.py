"""Makes a trace the only one in the process, while other threads run, and hides from them what it changes for all threads.

While torch.fx or torch.export traces, functions of torch are replaced, ``nn.Module.__call__`` among them. Plain calls in other threads get
what they would get without the trace. But Dynamo reads functions of torch as code, its guards compare them, and a second trace would take
the replaced functions for torch's own. So what a compiler or tracer of torch begins in another thread meanwhile waits at a *gate* until
the trace has ended, and a trace begins when none of that is under way elsewhere.

No thread waits for one that waits for it:

- A thread at a gate goes on if the tracing thread stands still: the trace then waits for that thread, as a forward does for its workers.
- A thread that compiles, and wants to trace in the midst of it, goes before those that do not.
- A thread that is parked (``parked``) is none that a trace has to wait for.
"""

from __future__ import annotations

import functools
import inspect
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache, partial
from threading import get_ident
from types import CodeType, FrameType, FunctionType
from typing import Any

import torch
from torch import fx
from torch.fx import _symbolic_trace

from graphreg.torch_internals.dynamo_marks import disable
from graphreg.torch_internals.fx import traces_here
from graphreg.torch_internals.interpreter import CalledInstead, with_own_code
from graphreg.torch_internals.patching import Changes, wrappers

# A thread that waits looks every millisecond. It counts its looks and not the time, which tells nothing on a machine that is busy.
STILL = 5_000  # looks after which a tracing thread that has not moved counts as one that waits
_COMPILES, _RUNS = 300_000, 500  # looks for which a trace waits for a compilation or trace elsewhere, and for a call of compiled code
_PAUSE = 0.001
_FLAG, _THREADS_FLAG = "_is_fx_tracing_flag", "_is_fx_tracing_tls"  # of all threads up to torch 2.14, of each thread from 2.15 on
_CONVERSION, _EXPORT = "torch._dynamo.convert_frame", "torch.export._trace"


class _Threads:
    """What the threads do.

    Attributes:
        waiting: The threads that wait to trace, in the order in which they came.
        tracing: The thread that traces; None if none does.
        depth: How many traces of torch.fx that thread is in.
        parked: How often each thread is parked.
        let_through: The threads for which the trace waits.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.waiting: dict[int, None] = {}
        self.tracing: int | None = None
        self.depth = 0
        self.parked: dict[int, int] = {}
        self.let_through: set[int] = set()

    def begin(self, looks: int) -> bool:
        """Begin to trace, if this thread, which has looked so often, may do so now; return whether it may."""
        me = get_ident()
        with self.lock:
            if self.tracing is not None:
                return False
            # none of these goes on while the trace runs, so the trace need not wait for them
            idle, codes, frames = {me, *self.waiting, *self.parked}, _codes(), sys._current_frames()
            compiles = {thread for thread, frame in frames.items() if _compiles_in(frame, codes)}
            first = [thread for thread in self.waiting if thread in compiles] or list(self.waiting)
            if first[0] != me or (compiles - idle and looks < _COMPILES):
                return False

            # closed before it looks, so that no call of compiled code begins in between
            self.depth = int(traces_here())
            _close_calls()
            if looks < _RUNS and any(_is_in(frame, _begins_call) for thread, frame in sys._current_frames().items() if thread not in idle):
                _open_calls()
                return False
            self.tracing = me
            del self.waiting[me]
            return True

    def leave(self, me: int) -> None:
        """End the trace of a thread, or its waiting for one."""
        with self.lock:
            self.waiting.pop(me, None)
            if self.tracing == me:
                self.tracing, self.depth = None, 0
                self.let_through.clear()
                _open_calls()
            if self is _Now.threads and self.tracing is None and not self.waiting:
                _open()

    def wait_at_gate(self) -> None:
        """Wait until no other thread traces or waits to trace."""
        me = get_ident()
        if (not self.waiting and self.tracing is None) or me in self.waiting or me in (self.tracing, *self.let_through):
            return
        if self.tracing is None and _compiles_in(sys._getframe(1), _codes()):  # the trace waits until this thread has finished
            return
        with parked():
            before, still = None, 0
            while self.tracing is not None or self.waiting:
                now = _position(self.tracing)
                still = still + 1 if now is not None and now == before else 0
                before = now
                if still > STILL:
                    self.let_through.add(me)
                    return
                time.sleep(_PAUSE)


class _Now:
    """``gates``: closed while a thread traces or waits to do so. ``calls``: the gate of compiled code, closed while a thread traces."""

    threads = _Threads()
    gates: Changes | None = None
    calls: Changes | None = None


def _renew() -> None:
    """Open the gates in a forked child: none of the other threads exists there."""
    _Now.threads = _Threads()
    _open_calls()
    _open()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)


def alone(changes: Changes) -> None:
    """Wait until no other thread traces or compiles, and keep the others from it until the block of ``changes`` ends."""
    threads, me = _Now.threads, get_ident()
    if threads.tracing == me:
        return
    changes.later(partial(threads.leave, me))
    with threads.lock:
        threads.waiting[me] = None
        if _Now.gates is None:
            _close()
    looks = 0
    while not threads.begin(looks):
        looks += 1
        time.sleep(_PAUSE)


@contextmanager
def parked() -> Iterator[None]:
    """Open a block in which this thread waits, so that a trace elsewhere need not wait for it, even in the midst of a compilation."""
    counts, me = _Now.threads.parked, get_ident()
    counts[me] = counts.get(me, 0) + 1
    try:
        yield
    finally:
        counts[me] -= 1
        if not counts[me]:
            del counts[me]


def only_here(new: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that is ``new`` in this thread, and ``original`` in all others."""
    me = get_ident()

    @functools.wraps(new)
    def call(*args: Any, **kwargs: Any) -> Any:
        return (new if get_ident() == me else original)(*args, **kwargs)

    return call


# What is under way


def _position(thread: int | None) -> tuple[int, int] | None:
    """Return where a thread is; None if there is no such thread."""
    frame = None if thread is None else sys._current_frames().get(thread)
    return None if frame is None else (id(frame), frame.f_lasti)


def _codes() -> set[CodeType]:
    """Return the code that traces or compiles, of torch.fx, torch.export and Dynamo, as far as they are imported."""
    return {inspect.unwrap(fx.Tracer.trace).__code__, *_compiling_codes()}


def _compiling_codes() -> set[CodeType]:
    return {inspect.unwrap(vars(sys.modules[place])[name]).__code__ for place, name in _ENTRIES if place in sys.modules}


# torch.export, and the function of Dynamo that was there before it
_EXPORTS = re.compile(r"torch[/\\](_?export[/\\].*|_dynamo[/\\]eval_frame\.py:inner)")
_ENTRIES = ((_CONVERSION, "_compile"), (_EXPORT, "_export"))


def _is_in(frame: FrameType | None, runs: Callable[[FrameType], bool]) -> bool:
    """Return whether one of a frame and those that called it ``runs`` something."""
    while frame is not None and not runs(frame):
        frame = frame.f_back
    return frame is not None


def _compiles_in(frame: FrameType, codes: set[CodeType]) -> bool:
    return _is_in(frame, lambda each: each.f_code in codes)


def is_compiling() -> bool:
    """Return whether Dynamo traces this code, or this thread compiles or exports.

    The public ``torch.compiler.is_compiling()`` is True in all threads while torch.export, or from torch 2.13 on Dynamo, works in one.
    """
    return _flagged() and (torch.compiler.is_dynamo_compiling() or _compiles_in(sys._getframe(1), _compiling_codes()) or exports_here())


_flagged = torch.compiler.is_compiling


def exports_here() -> bool:
    """Return whether this thread runs code of torch.export, or the export that is a part of Dynamo."""
    return _is_in(sys._getframe(1), lambda each: _EXPORTS.search(f"{each.f_code.co_filename}:{each.f_code.co_name}") is not None)


def _begins_call(frame: FrameType) -> bool:
    """Return whether a frame is that of a function that torch.compile has made of another one."""
    return frame.f_code.co_name == "compile_wrapper" and frame.f_code.co_filename.endswith("eval_frame.py")


# The gates


class _Flag:
    """Replaces torch.fx's flag for all threads. torch.compile asks it at the beginning of each call of compiled code, and waits here."""

    def __bool__(self) -> bool:
        threads = _Now.threads
        if _begins_call(sys._getframe(2)):
            threads.wait_at_gate()
        return threads.tracing == get_ident() and threads.depth > 0


class _ThreadsFlag:
    """Replaces the object in which torch.fx has a flag for each thread."""

    def __init__(self, original: Any) -> None:
        vars(self)["original"] = original

    def __getattr__(self, name: str) -> Any:
        if _begins_call(frame := sys._getframe(2)) or (frame.f_back is not None and _begins_call(frame.f_back)):
            _Now.threads.wait_at_gate()
        return getattr(vars(self)["original"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(vars(self)["original"], name, value)


class _Lock:
    """Replaces the lock under which Dynamo compiles."""

    def __init__(self, original: Any) -> None:
        self.original = original

    def __enter__(self) -> Any:
        _Now.threads.wait_at_gate()
        return self.original.__enter__()

    def __exit__(self, *error: Any) -> Any:
        return self.original.__exit__(*error)


def _close() -> None:
    """Close the gates: other threads wait there. The caller holds the lock of ``_Now.threads``."""
    gates = Changes()
    _Now.gates = gates
    original = vars(fx.Tracer)["trace"]
    ours = _own_trace(original)
    gates.later(partial(_put_trace_back, original, ours))
    fx.Tracer.trace = ours  # type: ignore[method-assign]
    if (conversion := sys.modules.get(_CONVERSION)) is not None:
        gates.put(conversion, "compile_lock", _Lock(vars(conversion)["compile_lock"]))
    if (export := sys.modules.get(_EXPORT)) is not None:
        gates.put(export, "_export", _waiting(vars(export)["_export"]))


def _close_calls() -> None:
    """Close the gate that torch.compile asks at each call of compiled code. No other thread is in a trace of torch.fx now."""
    _Now.calls = calls = Changes()
    if hasattr(_symbolic_trace, _THREADS_FLAG):
        calls.put(_symbolic_trace, _THREADS_FLAG, _ThreadsFlag(getattr(_symbolic_trace, _THREADS_FLAG)))
    else:
        # Another thread may have left the flag as it was when that thread's trace began.
        calls.later(partial(setattr, _symbolic_trace, _FLAG, traces_here()))
        setattr(_symbolic_trace, _FLAG, _Flag())


def _open_calls() -> None:
    if _Now.calls is not None:
        calls, _Now.calls = _Now.calls, None
        calls.__exit__(None, None, None)


def _open() -> None:
    if _Now.gates is not None:
        gates, _Now.gates = _Now.gates, None
        gates.__exit__(None, None, None)


def _waiting(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        _Now.threads.wait_at_gate()
        return original(*args, **kwargs)

    return call


def _own_trace(original: Any) -> Callable[..., Any]:
    """Return what replaces ``fx.Tracer.trace``, for this and other subclasses of ``fx.Tracer``.

    In the tracing thread, torch's code runs with global variables of its own, in which it sets its flag, and finds a patcher that replaces
    the methods of ``nn.Module`` for this thread alone. Other threads wait.
    """
    bare: Any = inspect.unwrap(original)  # Dynamo wraps it at its first use
    names = dict(vars(_symbolic_trace))
    copies = {name: with_own_code(names[name]) for name in _METHODS.values()}
    names.update(copies, _new_patcher=_own_patcher(_symbolic_trace._new_patcher, copies), _autowrap_check=_autowrap_check)
    code = FunctionType(bare.__code__, names, bare.__name__, bare.__defaults__, bare.__closure__)
    code.__kwdefaults__ = bare.__kwdefaults__

    @functools.wraps(original)
    def trace(self: Any, *args: Any, **kwargs: Any) -> Any:
        threads = _Now.threads
        if threads.tracing != get_ident():
            threads.wait_at_gate()
            return original(self, *args, **kwargs)
        threads.depth += 1
        try:
            return code(self, *args, **kwargs)
        finally:
            threads.depth -= 1

    return disable()(trace)


def _put_trace_back(original: Any, ours: Any) -> None:
    """Restore ``fx.Tracer.trace``. Dynamo may have wrapped what replaces it; then it wraps torch's own."""
    now = vars(fx.Tracer)["trace"]
    if now is not ours and inspect.unwrap(now, stop=lambda each: each is ours) is ours:
        original = sys.modules["torch._dynamo"].disable(original)
    fx.Tracer.trace = original  # type: ignore[method-assign]


# what torch.fx makes anew at each trace for each function of ``math``, sixty times
_wrapped = lru_cache(128)(_symbolic_trace._create_wrapped_func)
wrappers.add(_symbolic_trace._create_wrapped_func(len).__code__)
_check = FunctionType(_symbolic_trace._autowrap_check.__code__, {**vars(_symbolic_trace), "_create_wrapped_func": _wrapped})


def _autowrap_check(patcher: Any, names: dict[str, Any], functions: set[int]) -> None:
    """Do what torch.fx's function of this name does, but look first whether there is anything to replace among a module's names."""
    if not functions.isdisjoint(map(id, names.values())):
        _check(patcher, names, functions)


# The methods of ``nn.Module`` that torch.fx replaces while it traces, and where it keeps the originals.
_METHODS = {"__call__": "_orig_module_call", "__getattr__": "_orig_module_getattr"}


def _own_patcher(original: Callable[..., Any], copies: Mapping[str, Callable[..., Any]]) -> Callable[..., Any]:
    """Return a ``_new_patcher`` whose patcher replaces methods for this thread alone.

    When a method of a class is set, Python visits all subclasses and forgets which methods they have. For ``nn.Module`` this takes 0.06 ms
    with torch alone and 0.3 ms with timm, four times a trace, and later calls find their methods anew. So the patcher gives the methods of
    ``nn.Module`` other code instead.

    Args:
        original: torch.fx's.
        copies: What torch.fx takes for the methods that it replaces, by their names there: functions that keep their code.
    """

    @contextmanager
    def new_patcher() -> Iterator[Any]:
        with original() as patcher:

            def patch_method(cls: type, name: str, new: Any, deduplicate: bool = True) -> None:
                method = getattr(cls, name)
                if name not in _METHODS or method is not vars(_symbolic_trace)[_METHODS[name]]:  # a library has replaced it
                    type(patcher).patch_method(patcher, cls, name, only_here(new, method), deduplicate)
                    return
                calls = CalledInstead(method, lambda _: only_here(new, copies[_METHODS[name]]))
                patcher.patches_made.append(calls)
                calls.patch()

            patcher.patch_method = patch_method
            yield patcher

    return new_patcher
