"""``Counter``: base class of the key rule and the clock, the two runtime modules at the top of a graph that count calls.

The key rule returns the keys of the noise for the present call, and the clock returns the scheduled strengths of that call.
"""

from __future__ import annotations

import os
import threading
import weakref
from abc import abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from graphreg.errors import GraphRegError
from graphreg.rng.ahead import CallsAhead
from graphreg.rng.operators import between_calls
from graphreg.runtime.runtime_module import RuntimeModule
from graphreg.runtime.unfinished import running
from graphreg.torch_internals.autograd import NO_BACKWARD, backward_task, in_backward
from graphreg.torch_internals.dynamo_marks import disable
from graphreg.torch_internals.functorch import (
    CHUNKED,
    Chunk,
    chunks,
    in_chunks,
    innermost_transform,
    is_lent,
    is_wrapped,
    transforms,
    without_levels,
    without_transforms,
)
from graphreg.torch_internals.other_threads import is_compiling
from graphreg.torch_internals.torch_modes import is_exporting, jit_trace


class _CounterLock:
    """One lock for all modules, held for microseconds. A lock in each module would have to be left out of every copy and pickle."""

    now = threading.Lock()


def _new_lock() -> None:
    # the old lock may be held by a thread that exists only in the parent process, and never releases it
    _CounterLock.now = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_new_lock)


class _ThreadToken(threading.local):
    """Identifies each thread by an object of its own, because Python reuses the ident of a thread that has ended."""

    def __init__(self) -> None:
        self.token = object()


_thread = _ThreadToken()


def taking() -> AbstractContextManager[Any]:
    """Return the lock under which a call takes its number, so that two threads do not take the same number."""
    return _CounterLock.now


class Counter(RuntimeModule):
    """Returns what a graph needs in this call, and makes what it needs in the next: one runtime module at the top of the graph.

    It *assigns* new buffers. An increment in place would give wrong gradients, without an error, where the partitioner recomputes values
    in backward. What the graph needs is made one call ahead. If each call made what it needs itself, Inductor would fuse that computation
    into the kernels that use the result and repeat it for every element, which is slow.

    A subclass defines what a call needs (``made``), and the texts of the errors.

    Attributes:
        product: The name of the buffer that holds what the next call needs.
        step: The number of the next call, int64 [1].
        ahead: Makes what later calls need, in eager code; None if that is not worth it.
        streams: What ``ahead`` makes it from, int64 [streams].
        free: 0 while the noise is frozen, else 1, int64 [1]. Compiled graphs read it and not ``frozen_call``: it is a tensor, so freezing
            the noise does not recompile. It is not bool, because torch.optim.swa_utils.AveragedModel(use_buffers=True) subtracts buffers.
        in_backward_text: The error for a forward that runs in a backward pass.
        jit_text: The error for torch.jit.trace.
        lent_text: The error for torch.func.functional_call with the counter among its buffers.
    """

    product: ClassVar[str]
    in_backward_text: ClassVar[str]
    jit_text: ClassVar[str]
    lent_text: ClassVar[str]
    step: Tensor
    free: Tensor
    streams: Tensor
    ahead: CallsAhead | None = None
    # within a vmap over several calls (``sample``): what each of them needs, which was taken before
    several: Tensor | None = None

    def __init__(self, description: str) -> None:
        super().__init__(description)
        self.forced = False
        self.frozen_call: int | None = None  # the number of the call that is repeated while the noise is frozen
        self.blocks: dict[object, tuple[object, int]] = {}  # for each open block of frozen_noise: its thread, and the call that it repeats
        self.left: set[object] = set()  # the threads that have left their blocks while another thread is still in one
        self.beyond = 0  # how many call numbers after ``frozen_call`` were taken while the noise was frozen
        # For the last chunk that ran of a vmap with chunk_size: the vmap, the chunk's number, and the call number of the first chunk.
        self.chunk: tuple[object, int, int] = (None, 0, 0)
        self.register_buffer("step", torch.zeros(1, dtype=torch.int64, device="cpu"), persistent=False)
        self.register_buffer("free", torch.ones(1, dtype=torch.int64, device="cpu"), persistent=False)

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for a copy. The copy is in no block of ``frozen_noise``, because the block would never end there.

        It goes on with the call number with which this module would go on if its blocks ended now.
        """
        state = super().__getstate__()
        if self.frozen_call is None:
            return state
        with taking(), torch.inference_mode(False):
            step = torch.full_like(self.step, self.call())
            buffers = {**self._buffers, "step": step, self.product: self.made(step), "free": torch.ones_like(self.free)}
        return {**state, "_buffers": buffers, "frozen_call": None, "blocks": {}, "left": set(), "beyond": 0}

    @abstractmethod
    def made(self, step: Tensor) -> Tensor:
        """Return what the call of number ``step``, int64 [1], needs."""

    @abstractmethod
    def made_unless_frozen(self, step: Tensor, present: Tensor) -> Tensor:
        """Return ``made(step)``, or ``present`` if the noise is frozen. Tensor operations decide that, so one compiled graph does both."""

    @abstractmethod
    def warn_of_export(self) -> None:
        """Warn, once per export, that the program does not count its calls."""

    def refuse_backward(self) -> None:
        """Raise GraphRegError if a backward pass runs the forward again, unless frozen noise makes it repeat the first run."""
        if not in_backward():
            return
        if not self._is_frozen():
            raise GraphRegError(self.in_backward_text)
        threads = dict(self.blocks.values())
        if len(threads) > 1 and _thread.token not in threads:
            raise GraphRegError(
                "this module runs inside a backward pass, in a thread without a block of graphreg.frozen_noise, while "
                "several other threads are in such blocks, so it is not known whose masks to draw. Give each thread a copy of the module "
                "(copy.deepcopy)."
            )

    def _is_frozen(self) -> bool:
        """Whether this thread repeats a call: while any thread is in a block, all do, except those that have left theirs."""
        return self.frozen_call is not None and _thread.token not in self.left

    def of_call(self, counts: bool) -> Tensor:
        """Return what this call needs. If the call ``counts``, make what the next call needs."""
        present = self._buffers[self.product]
        assert present is not None
        if not counts:
            return present
        if not is_compiling() or (transforms() and in_chunks()):
            return self._taken()
        if is_exporting():
            self.warn_of_export()
        # Assigned in ``_buffers``: Module.__setattr__ does the same after checks, which Dynamo would have to trace.
        present, step = between_calls(present), between_calls(self.step) + 1
        following = between_calls(self.made_unless_frozen(step, present))
        step = between_calls(step)
        if transforms():
            step, following = without_levels(step), without_levels(following)
        self._buffers["step"], self._buffers[self.product] = step, following
        return present

    @disable(CHUNKED)
    def _taken(self) -> Tensor:
        """Return what this call needs and store what the next needs: one thread at a time, outside of the transforms of torch.func."""
        if self.several is not None:
            return self.several
        if backward_task() != NO_BACKWARD:
            self.refuse_backward()
        if jit_trace() is not None:
            raise GraphRegError(self.jit_text)
        step: Any = self._buffers["step"]
        if is_wrapped(step) or (self.frozen_call is None and is_lent(step, 2 + (0 if self.ahead is None else self.ahead.holds(step)))):
            raise GraphRegError(self.lent_text)

        if innermost_transform() is None:
            with _CounterLock.now:
                return self._advanced()
        running_chunks = chunks()
        with _CounterLock.now, without_transforms():
            if running_chunks and self.frozen_call is None:
                self._rejoin(running_chunks)
            return self._advanced()

    def _advanced(self) -> Tensor:
        """Return what this call needs and store what the next needs. The caller has the lock and has left the transforms of torch.func.

        If the call raises, its number is free again, unless another call has taken the next one (``_take_back``).
        """
        present, step = self._buffers[self.product], self._buffers["step"]
        assert present is not None and step is not None
        beyond, needed, is_frozen = self.beyond, present, self.frozen_call is not None

        following = None if is_frozen or self.ahead is None else self.ahead.after(step, self.streams)
        if following is None:
            following = step + 1, present
            if type(following[0]) is not type(step):  # shape propagation runs the module on fake tensors
                return present
            if is_frozen:
                number = self._number()
                needed = present if number == self.frozen_call else self.made(torch.full_like(step, number))
            else:
                following = following[0], self.made(following[0])
                if self.ahead is not None:
                    self.ahead.last = following[0]
        self._buffers["step"], self._buffers[self.product] = following

        if running.call is not None:
            running.call.append(partial(self._take_back, step, beyond, weakref.ref(self._buffers["step"]), self.beyond))
        return needed

    def _take_back(self, step: Tensor, beyond: int, next_step: weakref.ref[Any], next_beyond: int) -> None:
        """Undo ``_advanced``. ``step``, ``beyond``: what was there before; ``next_step``, ``next_beyond``: what it put there."""
        with taking(), without_transforms():
            if self._buffers["step"] is not next_step():
                return
            self._buffers["step"] = step
            self.beyond = beyond if self.beyond == next_beyond else self.beyond
            if self.frozen_call is None:  # not the former product: streams may have been added since
                self._buffers[self.product] = self.made(step)

    def _number(self) -> int:
        """Return the number of this thread's call while the noise is frozen: of the call that the thread repeats, or else a new number."""
        threads = dict(self.blocks.values())
        if _thread.token in threads:
            return threads[_thread.token]
        if self._is_frozen():  # a thread that has entered no block
            return next(iter(threads.values())) if len(threads) == 1 else self._required_frozen_call()
        return self._next_beyond()

    def _required_frozen_call(self) -> int:
        assert self.frozen_call is not None
        return self.frozen_call

    def _next_beyond(self) -> int:
        """Reserve the next free call number after the frozen one, and return it."""
        self.beyond += 1
        return self._required_frozen_call() + self.beyond

    def _rejoin(self, running: Sequence[Chunk]) -> None:
        """Let each chunk of a vmap with ``chunk_size`` begin with the call number of the first chunk, because a batch is one call."""
        if len(running) > 1:
            raise GraphRegError(
                "the module draws noise within two vmaps that both have a chunk_size, so it is not known which rows belong to one call. "
                "Leave the inner chunk_size out."
            )
        run, number, call = self.chunk
        if run is not running[0].run:
            call = int(self.step)
        elif number != running[0].number:
            self.seek(call)
        self.chunk = (running[0].run, running[0].number, call)

    def call(self) -> int:
        """Return the number of the next call. All calls in a block of ``frozen_noise`` count as one, or as none if none of them counts."""
        step = int(self.step)
        if self.frozen_call is None:
            return step
        return self.frozen_call + self.beyond + 1 if self.beyond else min(step, self.frozen_call + 1)

    def seek(self, call: int) -> None:
        """Make ``call`` the number of the next call."""
        self.step = torch.full_like(self.step, call)
        self._buffers[self.product] = self.made(self.step)
        if self.frozen_call is not None:
            # The open blocks repeat the new call from here on.
            self.frozen_call, self.beyond = call, 0
            self.blocks = {block: (thread, call) for block, (thread, _) in self.blocks.items()}

    @property
    def is_frozen(self) -> bool:
        """Whether a block of ``frozen_noise`` is open, in any thread."""
        return self.frozen_call is not None

    def settle(self) -> None:
        """Replace buffers that were made under ``torch.inference_mode``: a compiled graph could not save them for backward later."""
        if self.step.is_inference():
            with torch.inference_mode(False):
                for name in ("step", self.product):
                    self._buffers[name] = self._buffers[name].clone()  # type: ignore[union-attr]

    def freeze(self, block: object) -> None:
        """Begin a block of ``frozen_noise``: until this thread's blocks end, all calls in this thread repeat its next call."""
        with taking(), without_transforms():  # what is made here outlasts a transform around the block
            mine = [number for thread, number in self.blocks.values() if thread is _thread.token]
            if self.frozen_call is None:
                self.frozen_call, self.free = int(self.step), torch.zeros_like(self.free)
                number = self.frozen_call
            else:
                # A nested block repeats the call of the outer one; one of another thread, a call of
                # its own.
                number = mine[0] if mine else self._next_beyond()
            self.left.discard(_thread.token)
            self.blocks[block] = (_thread.token, number)

    def release(self, block: object) -> None:
        """End a block. At the end of the last block, go on with the first call number that was not used while the noise was frozen."""
        with taking(), without_transforms():
            thread, _ = self.blocks.pop(block, (None, 0))
            if thread is not None and all(thread is not other for other, _ in self.blocks.values()):
                self.left.add(thread)
            if self.blocks or self.frozen_call is None:
                return
            call, self.frozen_call, self.free = self.call(), None, torch.ones_like(self.free)
            self.beyond, self.left = 0, set()
            self.seek(call)


class SharedCounter(RuntimeModule):
    """Stands in one graph for the counter that several graphs share. It knows the modules whose modes decide if a call of its graph counts.

    ``shared``: the shared counter, in a tuple, so that it does not become a submodule.
    """

    def __init__(self, shared: Counter) -> None:
        super().__init__(shared.description)
        self.shared = (shared,)

    def refuse_backward(self) -> None:
        """Do what ``Counter.refuse_backward`` does."""
        self.shared[0].refuse_backward()


@disable()
def settle(rules: Any) -> None:
    """Call ``Counter.settle`` of each counter in a container of runtime modules."""
    for child in rules.children():
        counter = child.shared[0] if isinstance(child, SharedCounter) else child
        if isinstance(counter, Counter):
            counter.settle()
