"""The keys of a call: the leaf at the top of the graph that gives them, and makes those of the next call."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from graphreg.errors import GraphRegError
from graphreg.functorch import CHUNKED, Chunk, chunks, in_chunks, is_wrapped, outside, transforms, unwrapped
from graphreg.noise import call_keys, next_keys, of_process
from graphreg.rules import Leaf


class _Lock:
    """One for all modules, held for microseconds: a module's own would have to be left out of every copy and pickle."""

    now = threading.Lock()


def _anew() -> None:
    _Lock.now = threading.Lock()  # another thread of the parent may have held it, which the child does not have


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_anew)


def taking() -> AbstractContextManager[Any]:
    """While a call takes its number: no other thread takes one."""
    return _Lock.now


class KeyRule(Leaf):
    """Gives the keys of this call and makes those of the next: one leaf at the top of the graph.

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
        self.held: int | None = None  # the call whose masks every call draws, see control.frozen_noise
        self.alike = False  # whether all ranks draw the same
        self.part: tuple[object, int, int] = (None, 0, 0)  # of a chunked vmap: whose, which, and the call with which it began
        self.register_buffer("streams", torch.tensor(list(streams.values()), dtype=torch.int64), persistent=False)
        self.register_buffer("step", torch.zeros(1, dtype=torch.int64), persistent=False)
        self.register_buffer("keys", call_keys(self.streams, self.step), persistent=False)
        # What a compiled graph asks instead of ``held``: a tensor, so that holding the noise compiles nothing again; a number, as
        # torch.optim.swa_utils.AveragedModel(use_buffers=True) subtracts buffers.
        self.register_buffer("free", torch.ones(1, dtype=torch.int64), persistent=False)

    def draws(self, always: bool = False) -> bool:
        return always or self.forced or self.always or any(owner.training for owner in self.owner)

    def refuse_backward(self) -> None:
        """Raise where a backward pass runs the forward again, which would draw the next masks."""
        if self.held is None and torch._C._current_graph_task_id() != -1:
            raise GraphRegError(
                "this module runs inside a backward pass: activation checkpointing around the whole of it would draw "
                "other masks than the forward did. Put forward and backward under graphreg.frozen_noise(module), or "
                "checkpoint blocks inside the model, and compile outside."
            )

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
        if not transforms():
            with taking():
                return self._advanced()
        if is_wrapped(self.step):
            raise GraphRegError(
                "the noise's own counter was mapped over by torch.vmap, or comes from another transform of torch.func: it would not "
                "count on. Leave what begins with 'graphreg_rules.' out of what torch.func.functional_call is given."
            )
        parts = chunks()
        with taking(), outside():
            if parts and self.held is None:
                self._rejoin(parts)
            return self._advanced()

    _taken_of_chunk = torch.compiler.disable(_taken, reason=CHUNKED)  # type: ignore[no-untyped-call]

    def _advanced(self) -> Tensor:
        keys, step = self.keys, self.step + 1
        if type(step) is type(self.step):  # shape propagation calls with fake tensors
            self._buffers["step"] = step
            if self.held is None:
                self._buffers["keys"] = call_keys(self.streams, step)
        return keys

    def _rejoin(self, parts: Sequence[Chunk]) -> None:
        """Each part of a vmap with ``chunk_size`` has the calls of the first: the rows of a batch are of one call."""
        if len(parts) > 1:
            raise GraphRegError(
                "the module draws noise within two vmaps that both have a chunk_size, and which rows belong together is not known. "
                "Leave the inner chunk_size out."
            )
        run, number, call = self.part
        if run is not parts[0].run:
            call = int(self.step)
        elif number != parts[0].number:
            self.seek(call)
        self.part = (parts[0].run, parts[0].number, call)

    def call(self) -> int:
        """The next call's number. All calls that draw under ``hold`` are one."""
        step = int(self.step)
        return step if self.held is None else min(step, self.held + 1)

    def seek(self, call: int) -> None:
        """Go to a call: the next forward draws its masks."""
        self.step = torch.full_like(self.step, call)
        self.keys = call_keys(self.streams, self.step)
        if self.held is not None:
            self.held = call

    def settle(self) -> None:
        """Out of ``torch.inference_mode``, whose tensors a compiled graph could not save for backward later."""
        if self.step.is_inference():
            with torch.inference_mode(False):
                self.step, self.keys = self.step.clone(), self.keys.clone()

    def hold(self) -> None:
        """From here on every call draws the masks of the next one."""
        self.held, self.free = int(self.step), torch.zeros_like(self.free)

    def release(self) -> None:
        """Go on behind the held call, if anything drew it."""
        call, self.held, self.free = self.call(), None, torch.ones_like(self.free)
        self.seek(call)
