"""A step of the user's, run once under observation: what is drawn while its backward pass runs.

A backward pass that runs parts of the forward again must draw what the forward drew. Whoever sees to that leaves the counter of
graphreg's noise and torch's generators where they were: a checkpoint that preserves the state puts it back, ``frozen_noise`` holds
it. Where one has moved behind a backward pass, that pass drew anew. This needs nothing of the code that runs, compiled or not.
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
    """``backwards``: passes that ran. ``forward``, ``again``: calls that drew from graphreg's streams outside and within them.

    ``moved``: passes behind which a generator of torch had moved.
    """

    backwards: int = 0
    forward: int = 0
    again: int = 0
    moved: int = 0


def observe(module: nn.Module, key: KeyRule | None, step: Callable[[], Any]) -> Observed:
    """Run the step once. Parameters, buffers, gradients, modes and generators are afterwards as they were."""
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
                seen.again += _call(key) - call if key is not None and key.held is None else 0

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
    """Puts back the tensors and what they held: a compiled forward assigns buffers, batch norm and an optimizer write into them."""
    modes = [(m, m.training) for m in module.modules()]
    places: list[tuple[dict[str, Any], str, Tensor, Tensor]]
    places = [(slots, name, t, t.detach().clone()) for m in module.modules() for slots in (m._parameters, m._buffers)
              for name, t in slots.items() if t is not None]  # fmt: skip
    grads = [(p, p.grad) for p in module.parameters()]
    state = random.getstate()

    def back() -> None:
        random.setstate(state)
        with torch.no_grad():
            for slots, name, tensor, held in places:
                if slots.get(name) is not tensor:
                    slots[name] = tensor
                if not torch.equal(tensor, held):
                    tensor.copy_(held)
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
