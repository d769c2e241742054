"""The runtime module at the top of a graph that gives the keys of a call's draws, and makes those of the next call."""
from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from graphreg.errors import GraphRegError
from graphreg.rng import call_keys, next_keys, of_process
from graphreg.runtime.runtime_module import RuntimeModule
from graphreg.torch_internals import (
    CHUNKED,
    Chunk,
    chunks,
    in_backward,
    in_chunks,
    is_lent,
    is_wrapped,
    transforms,
    unwrapped,
    without_transforms,
)


class _Lock:
    """One for all modules, held for microseconds: a module's own would have to be left out of every copy and pickle."""

    now = threading.Lock()


def _anew() -> None:
    _Lock.now = threading.Lock()  # another thread of the parent may have held it, which the child does not have


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_anew)


class _Thread(threading.local):
    """Knows each thread by an object of its own: an ident may become another thread's."""

    def __init__(self) -> None:
        self.token = object()


_thread = _Thread()


def taking() -> AbstractContextManager[Any]:
    """While a call takes its number: no other thread takes one."""
    return _Lock.now


class KeyRule(RuntimeModule):
    """Gives the keys of this call and makes those of the next: one runtime module at the top of the graph.

    It *assigns* new buffers. An increment in place gives silently wrong gradients when the partitioner recomputes
    the masks in backward; so does a key derived at its use, which is inlined into every element's arithmetic.
    """

    streams: Tensor
    step: Tensor
    keys: Tensor
    free: Tensor

    def __init__(self, streams: Mapping[str, int]) -> None:
        super().__init__("the keys of the call")
        self.names = tuple(streams)
        self.forced = False
        self.forcing: dict[object, None] = {}  # the blocks of control.noise_on
        self.frozen_call: int | None = None  # the call whose masks every call draws, see control.frozen_noise
        self.blocks: dict[object, tuple[object, int]] = {}  # those that hold the noise: the thread of each, and its call
        self.left: set[object] = set()  # the threads that ended their blocks while another's still holds the noise
        self.beyond = 0  # how many calls behind the held one were taken meanwhile
        self.alike = False  # whether all ranks draw the same
        self.chunk: tuple[object, int, int] = (None, 0, 0)  # of a chunked vmap: whose, which, and the call with which it began
        self.register_buffer("streams", torch.tensor(list(streams.values()), dtype=torch.int64), persistent=False)
        self.register_buffer("step", torch.zeros(1, dtype=torch.int64), persistent=False)
        self.register_buffer("keys", call_keys(self.streams, self.step), persistent=False)
        # What a compiled graph asks instead of ``frozen_call``: a tensor, so that holding the noise compiles nothing again; a number, as
        # torch.optim.swa_utils.AveragedModel(use_buffers=True) subtracts buffers.
        self.register_buffer("free", torch.ones(1, dtype=torch.int64), persistent=False)

    def draws(self, always: bool = False) -> bool:
        return always or self.forced or self.always or any(owner.training for owner in self.owner)

    def refuse_backward(self) -> None:
        """Raise where a backward pass runs the forward again, which would draw the next masks."""
        if not in_backward():
            return
        if not self._is_frozen():
            raise GraphRegError(
                "this module runs inside a backward pass: activation checkpointing around the whole of it would draw "
                "other masks than the forward did. Put forward and backward under graphreg.frozen_noise(module), or "
                "checkpoint blocks inside the model, and compile outside."
            )
        threads = dict(self.blocks.values())
        if len(threads) > 1 and _thread.token not in threads:
            raise GraphRegError(
                "this module runs inside a backward pass, in a thread of autograd's, while several threads hold its noise "
                "(graphreg.frozen_noise), and whose masks are meant is not known. Give each thread a copy of the module: copy.deepcopy."
            )

    def _is_frozen(self) -> bool:
        """Whether the noise is held for this thread: also for one that a block made, but not for one whose own block has ended."""
        return self.frozen_call is not None and _thread.token not in self.left

    def forward(self, always: bool = False) -> Tensor:
        """``always``: the graph has a dropout of the model's own that acts in eval mode too."""
        if not self.draws(always):
            keys = self.keys
        elif not torch.compiler.is_compiling():
            keys = self._taken()
        elif transforms() and in_chunks():
            keys = self._taken_of_chunk()
        else:
            # Into the dict that Module.__setattr__ would write to, after Dynamo had traced all of its questions.
            keys, step = self.keys, self.step + 1
            following = next_keys(self.streams, step, self.free, keys)
            self._buffers["step"], self._buffers["keys"] = (unwrapped(step), unwrapped(following)) if transforms() else (step, following)
        return of_process(keys, self.alike)

    def _taken(self) -> Tensor:
        """The keys of this call, when those of the next have taken their place: for one thread at a time, outside of torch.func."""
        self.refuse_backward()
        if is_wrapped(self.step) or (self.frozen_call is None and is_lent(self.step)):
            raise GraphRegError(
                "the noise's own counter is among what torch.func.functional_call was given: it would not count on, and each call would "
                "draw the same. Leave what begins with 'graphreg_rules.' out: {n: b for n, b in module.named_buffers() if "
                "'graphreg_rules.' not in n}. For the same masks in each call there is graphreg.frozen_noise(module)."
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
        keys, step = self.keys, self.step + 1
        if type(step) is not type(self.step):  # shape propagation calls with fake tensors
            return keys
        self._buffers["step"] = step
        if self.frozen_call is None:
            self._buffers["keys"] = call_keys(self.streams, step)
            return keys
        number = self._number()
        return keys if number == self.frozen_call else call_keys(self.streams, torch.full_like(step, number))

    def _number(self) -> int:
        """The call of this thread, while somebody holds the noise."""
        threads = dict(self.blocks.values())
        if _thread.token in threads:
            return threads[_thread.token]
        if self._is_frozen():  # of a thread without a block of its own
            return next(iter(threads.values())) if len(threads) == 1 else self._required_frozen_call()
        return self._behind()

    def _required_frozen_call(self) -> int:
        assert self.frozen_call is not None
        return self.frozen_call

    def _behind(self) -> int:
        """Takes the next call behind the held one."""
        self.beyond += 1
        return self._required_frozen_call() + self.beyond

    def _rejoin(self, running: Sequence[Chunk]) -> None:
        """Each part of a vmap with ``chunk_size`` has the calls of the first: the rows of a batch are of one call."""
        if len(running) > 1:
            raise GraphRegError(
                "the module draws noise within two vmaps that both have a chunk_size, and which rows belong together is not known. "
                "Leave the inner chunk_size out."
            )
        run, number, call = self.chunk
        if run is not running[0].run:
            call = int(self.step)
        elif number != running[0].number:
            self.seek(call)
        self.chunk = (running[0].run, running[0].number, call)

    def call(self) -> int:
        """The next call's number. All calls that draw in one block of ``freeze`` are one."""
        step = int(self.step)
        if self.frozen_call is None:
            return step
        return self.frozen_call + self.beyond + 1 if self.beyond else min(step, self.frozen_call + 1)

    def seek(self, call: int) -> None:
        """Go to a call: the next forward draws its masks."""
        self.step = torch.full_like(self.step, call)
        self.keys = call_keys(self.streams, self.step)
        if self.frozen_call is not None:
            self.frozen_call, self.beyond = call, 0
            self.blocks = {block: (thread, call) for block, (thread, _) in self.blocks.items()}

    def settle(self) -> None:
        """Out of ``torch.inference_mode``, whose tensors a compiled graph could not save for backward later."""
        if self.step.is_inference():
            with torch.inference_mode(False):
                self.step, self.keys = self.step.clone(), self.keys.clone()

    def freeze(self, block: object) -> None:
        """From here on every call of this thread draws the masks of the next one, until its blocks have ended."""
        with taking():
            mine = [number for thread, number in self.blocks.values() if thread is _thread.token]
            if self.frozen_call is None:
                self.frozen_call, self.free = int(self.step), torch.zeros_like(self.free)
                number = self.frozen_call
            else:
                number = mine[0] if mine else self._behind()
            self.left.discard(_thread.token)
            self.blocks[block] = (_thread.token, number)

    def release(self, block: object) -> None:
        """End a block; behind the last, go on behind the calls that were held and taken, if anything drew them."""
        with taking():
            thread, _ = self.blocks.pop(block, (None, 0))
            if thread is not None and all(thread is not other for other, _ in self.blocks.values()):
                self.left.add(thread)
            if self.blocks or self.frozen_call is None:
                return
            call, self.frozen_call, self.free = self.call(), None, torch.ones_like(self.free)
            self.beyond, self.left = 0, set()
            self.seek(call)
