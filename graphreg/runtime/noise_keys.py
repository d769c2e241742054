"""``KeyRule``, the runtime module at the top of a graph: it returns the noise keys of this call and makes those of the next."""
from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from graphreg.errors import GraphRegError, warn
from graphreg.rng import call_keys, next_keys, of_process
from graphreg.runtime.runtime_module import RuntimeModule
from graphreg.torch_internals import (
    CHUNKED,
    Chunk,
    chunks,
    in_backward,
    in_chunks,
    is_exporting,
    is_lent,
    is_wrapped,
    jit_trace,
    transforms,
    unwrapped,
    without_transforms,
)


class _Lock:
    """One lock for all modules, held for microseconds. A lock in each module would have to be left out of every copy and pickle."""

    now = threading.Lock()


def _new_lock() -> None:
    _Lock.now = threading.Lock()  # the old lock may be held by a thread that exists only in the parent process, and never releases it


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_new_lock)


class _Thread(threading.local):
    """Identifies each thread by an object of its own, because Python reuses the ident of a thread that has ended."""

    def __init__(self) -> None:
        self.token = object()


_thread = _Thread()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _warn_of_export() -> None:
    """Warn, once per export, that the program draws the same masks at each call."""
    warn(
        "this module is exported while it draws noise, and the program will draw the same masks at each call. Export it in eval mode "
        "(module.eval()), or export graphreg.strip(module)."
    )


def taking() -> AbstractContextManager[Any]:
    """Return the lock under which a call takes its number, so that two threads do not take the same number."""
    return _Lock.now


class KeyRule(RuntimeModule):
    """Returns the keys of this call and makes those of the next: one runtime module at the top of the graph.

    It *assigns* new buffers. An increment in place would give wrong gradients, without an error, where the partitioner recomputes the masks
    in backward. Keys are made one call ahead. If a call computed its own keys, Inductor would fuse that computation into the kernels that
    use the keys and repeat it for every element, which is slow.
    """

    streams: Tensor
    step: Tensor
    keys: Tensor
    free: Tensor

    def __init__(self, streams: Mapping[str, int]) -> None:
        super().__init__("the keys of the call")
        self.names = tuple(streams)
        self.forced = False
        self.frozen_call: int | None = None  # the call whose masks are drawn while the noise is frozen, see controls.frozen_noise
        self.blocks: dict[object, tuple[object, int]] = {}  # by open block of frozen_noise: its thread, and its call number
        self.left: set[object] = set()  # the threads that left their blocks while another thread is still in one
        self.beyond = 0  # how many call numbers after ``frozen_call`` were taken while the noise was frozen
        self.alike = False  # whether all ranks draw the same masks
        # Of the last chunk of a vmap: the vmap, the chunk's number, and the call number of that vmap's first chunk.
        self.chunk: tuple[object, int, int] = (None, 0, 0)
        self.register_buffer("streams", torch.tensor(list(streams.values()), dtype=torch.int64), persistent=False)
        self.register_buffer("step", torch.zeros(1, dtype=torch.int64), persistent=False)
        self.register_buffer("keys", call_keys(self.streams, self.step), persistent=False)
        # 0 while the noise is frozen, else 1. Compiled graphs read it instead of ``frozen_call``: it is a tensor, so freezing the noise
        # does not recompile. It is not bool, because torch.optim.swa_utils.AveragedModel(use_buffers=True) subtracts buffers.
        self.register_buffer("free", torch.ones(1, dtype=torch.int64), persistent=False)

    def draws(self, always: bool = False) -> bool:
        """Whether a call draws in the present modes; ``always`` as in ``forward``."""
        return always or self.forced or self.always or any(owner.training for owner in self.owner)

    def refuse_backward(self) -> None:
        """Raise GraphRegError if a backward pass runs the forward again, unless frozen noise ensures that it draws the same masks."""
        if not in_backward():
            return
        if not self._is_frozen():
            raise GraphRegError(
                "this module runs inside a backward pass: activation checkpointing around the whole module would draw "
                "other masks than the forward did. Put forward and backward into one block of "
                "graphreg.frozen_noise(module), or checkpoint only blocks inside the model, and call torch.compile on the whole module."
            )
        threads = dict(self.blocks.values())
        if len(threads) > 1 and _thread.token not in threads:
            raise GraphRegError(
                "this module runs inside a backward pass, in a thread without a block of graphreg.frozen_noise, while "
                "several other threads are in such blocks, so it is not known whose masks to draw. Give each thread a copy of the module "
                "(copy.deepcopy)."
            )

    def _is_frozen(self) -> bool:
        """Whether this thread draws frozen masks: while any thread is in a block, all threads do except those that have left a block."""
        return self.frozen_call is not None and _thread.token not in self.left

    def forward(self, always: bool = False) -> Tensor:
        """Return the keys of this call, int32 [streams, 2]. ``always``: whether the graph has a native dropout that acts in any mode."""
        return self.keys_of_call(self.draws(always))

    def keys_of_call(self, draws: bool) -> Tensor:
        """Return the keys of this call, int32 [streams, 2], and make those of the next if the call ``draws``."""
        if not draws:
            keys = self.keys
        elif not torch.compiler.is_compiling():
            keys = self._taken()
        elif transforms() and in_chunks():
            keys = self._taken_of_chunk()
        else:
            if is_exporting():
                _warn_of_export()
            # Assigned in ``_buffers``: Module.__setattr__ does the same after checks, which Dynamo would have to trace.
            keys, step = self.keys, self.step + 1
            following = next_keys(self.streams, step, self.free, keys)
            self._buffers["step"], self._buffers["keys"] = (unwrapped(step), unwrapped(following)) if transforms() else (step, following)
        return of_process(keys, self.alike)

    def _taken(self) -> Tensor:
        """Return the keys of this call and store those of the next: one thread at a time, outside of the transforms of torch.func."""
        self.refuse_backward()
        if jit_trace() is not None:
            raise GraphRegError(
                "torch.jit.trace would freeze the masks of this call, and use them in every call. Trace the module in eval mode "
                "(module.eval()), or trace graphreg.strip(module)."
            )
        if is_wrapped(self.step) or (self.frozen_call is None and is_lent(self.step)):
            raise GraphRegError(
                "torch.func.functional_call was given the counter of the module's noise: it would not advance, and each call would draw "
                "the same masks. Leave out the names that begin with 'graphreg_rules.': {n: b for n, b in module.named_buffers() if "
                "'graphreg_rules.' not in n}. To draw the same masks in each call, use graphreg.frozen_noise(module)."
            )
        if not transforms():
            with taking():
                return self._advanced()
        running = chunks()
        with taking(), without_transforms():
            if running and self.frozen_call is None:
                self._rejoin(running)
            return self._advanced()

    _taken_of_chunk = torch.compiler.disable(_taken, reason=CHUNKED)  # type: ignore[no-untyped-call]

    def _advanced(self) -> Tensor:
        """Return the keys of this call and store those of the next. The caller has the lock and has left the transforms of torch.func."""
        keys, step = self.keys, self.step + 1
        if type(step) is not type(self.step):  # shape propagation runs the module on fake tensors
            return keys
        self._buffers["step"] = step
        if self.frozen_call is None:
            self._buffers["keys"] = call_keys(self.streams, step)
            return keys
        number = self._number()
        return keys if number == self.frozen_call else call_keys(self.streams, torch.full_like(step, number))

    def _number(self) -> int:
        """Return the number of the call whose masks this thread draws, while some thread has frozen the noise."""
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
        """Return the number of the next call. All calls that draw in one block of ``frozen_noise`` count as one."""
        step = int(self.step)
        if self.frozen_call is None:
            return step
        return self.frozen_call + self.beyond + 1 if self.beyond else min(step, self.frozen_call + 1)

    def seek(self, call: int) -> None:
        """Go to the call of this number: the next forward draws its masks."""
        self.step = torch.full_like(self.step, call)
        self.keys = call_keys(self.streams, self.step)
        if self.frozen_call is not None:
            self.frozen_call, self.beyond = call, 0
            self.blocks = {block: (thread, call) for block, (thread, _) in self.blocks.items()}

    def settle(self) -> None:
        """Replace buffers that were made under ``torch.inference_mode``: a compiled graph could not save them for backward later."""
        if self.step.is_inference():
            with torch.inference_mode(False):
                self.step, self.keys = self.step.clone(), self.keys.clone()

    def freeze(self, block: object) -> None:
        """Begin a block of ``frozen_noise``: until this thread's blocks end, all calls in this thread draw the masks of its next call."""
        with taking():
            mine = [number for thread, number in self.blocks.values() if thread is _thread.token]
            if self.frozen_call is None:
                self.frozen_call, self.free = int(self.step), torch.zeros_like(self.free)
                number = self.frozen_call
            else:
                number = mine[0] if mine else self._next_beyond()
            self.left.discard(_thread.token)
            self.blocks[block] = (_thread.token, number)

    def release(self, block: object) -> None:
        """End a block. At the end of the last block, go on with the first call number that was not used while the noise was frozen."""
        with taking():
            thread, _ = self.blocks.pop(block, (None, 0))
            if thread is not None and all(thread is not other for other, _ in self.blocks.values()):
                self.left.add(thread)
            if self.blocks or self.frozen_call is None:
                return
            call, self.frozen_call, self.free = self.call(), None, torch.ones_like(self.free)
            self.beyond, self.left = 0, set()
            self.seek(call)


class SharedKeyRule(RuntimeModule):
    """The key rule of one of several graphs that count their calls together. It knows which modes matter to its own graph.

    ``shared``: the key rule that has the streams and counts the calls, in a tuple, so that it does not become a submodule.
    """

    def __init__(self, shared: KeyRule) -> None:
        super().__init__(shared.description)
        self.shared = (shared,)

    def draws(self, always: bool = False) -> bool:
        """Whether a call of this graph draws in the present modes; ``always`` as in ``forward``."""
        return always or self.shared[0].forced or self.always or any(owner.training for owner in self.owner)

    def refuse_backward(self) -> None:
        """Do what ``KeyRule.refuse_backward`` does."""
        self.shared[0].refuse_backward()

    def forward(self, always: bool = False) -> Tensor:
        """Return the keys of this call, int32 [streams, 2]; ``always`` as in ``KeyRule.forward``."""
        return self.shared[0].keys_of_call(self.draws(always))


def key_of(rules: Any) -> KeyRule | None:
    """Return the key rule that counts the calls of a graph, given the container of its runtime modules; None if the graph draws nothing."""
    key = rules._modules.get("key")
    if isinstance(key, SharedKeyRule):
        return key.shared[0]
    return key if isinstance(key, KeyRule) else None
