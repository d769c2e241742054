"""The keys of a call: the leaf at the top of the graph that gives them, and makes those of the next call."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from graphreg.errors import GraphRegError
from graphreg.noise import call_keys, next_keys, rank, ranked
from graphreg.rules import Leaf


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
        keys = self.keys
        if self.draws(always):
            compiling = torch.compiler.is_compiling()
            if not compiling:
                self.refuse_backward()
            # Into the dict that Module.__setattr__ would write to, after Dynamo had traced all of its questions.
            step = self.step + 1
            if compiling or type(step) is type(self.step):  # shape propagation calls with fake tensors
                self._buffers["step"] = step
                if compiling:
                    self._buffers["keys"] = next_keys(self.streams, step, self.free, keys)
                elif self.held is None:
                    self._buffers["keys"] = call_keys(self.streams, step)
        return keys if self.alike else ranked(keys, rank())

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
