"""Runs one step of the user's and watches whether its backward pass draws new random numbers.

A backward pass that recomputes parts of the forward must draw what the forward drew. Correct code leaves the counter of graphreg's
noise and torch's generators where they were: a checkpoint that preserves the state restores it, and ``frozen_noise`` holds it. If one
of them has moved after a backward pass, that pass drew anew. This works for any code, compiled or not.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graphreg.runtime import KeyRule
from graphreg.torch_internals import Changes, wrap_engine


@dataclass
class Observed:
    """What was counted during the step.

    Attributes:
        backwards: Backward passes.
        forward: Calls of the module that drew from graphreg's streams outside a backward pass.
        again: Calls of the module that drew from graphreg's streams within a backward pass.
        moved: Backward passes after which one of torch's generators had moved.
    """

    backwards: int = 0
    forward: int = 0
    again: int = 0
    moved: int = 0


def observe(module: nn.Module, key: KeyRule | None, step: Callable[[], Any]) -> Observed:
    """Run the step once and count its draws. Parameters, buffers, gradients, modes and generators are restored afterwards."""
    seen = Observed()
    before = 0 if key is None else int(key.step)
    with _left_as_it_was(module), _watched(seen, key):
        step()
        if key is not None:
            seen.forward = int(key.step) - before - seen.again
    return seen


@contextmanager
def _watched(seen: Observed, key: KeyRule | None) -> Iterator[None]:
    """Counts around each outermost run of the engine."""
    running = False

    def watching(run: Callable[..., Any]) -> Callable[..., Any]:
        """The engine's function, with what is drawn in its outermost call counted."""

        def watched(*args: Any, **kwargs: Any) -> Any:
            nonlocal running
            if running:
                return run(*args, **kwargs)
            running, state, call = True, _generators(), _call(key)
            try:
                return run(*args, **kwargs)
            finally:
                running = False
                seen.backwards += 1
                seen.moved += any(not torch.equal(a, b) for a, b in zip(state, _generators(), strict=False))
                seen.again += _call(key) - call if key is not None and key.frozen_call is None else 0

        return watched

    with Changes() as changes, changes:
        wrap_engine(changes, watching)
        yield


def _call(key: KeyRule | None) -> int:
    return 0 if key is None else int(key.step)


def _generators() -> list[Tensor]:
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [])]  # type: ignore[no-untyped-call]


@contextmanager
def _left_as_it_was(module: nn.Module) -> Iterator[None]:
    """Restore the module's tensors and their values: a compiled forward assigns buffers; batch norm and optimizers write in place."""
    modes = [(m, m.training) for m in module.modules()]
    places: list[tuple[dict[str, Any], str, Tensor, Tensor]]
    places = [(slots, name, t, t.detach().clone()) for m in module.modules() for slots in (m._parameters, m._buffers)
              for name, t in slots.items() if t is not None]  # fmt: skip
    grads = [(p, p.grad) for p in module.parameters()]
    state = random.getstate()

    def back() -> None:
        random.setstate(state)
        with torch.no_grad():
            for slots, name, tensor, value in places:
                if slots.get(name) is not tensor:
                    slots[name] = tensor
                if not torch.equal(tensor, value):
                    tensor.copy_(value)
            for p, grad in grads:
                p.grad = grad
        for m, training in modes:
            m.training = training

    with Changes() as changes, changes:
        changes.later(back)
        for p, _ in grads:
            p.grad = None
        with torch.random.fork_rng():
            yield
