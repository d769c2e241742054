"""Runs one training step of the user's and detects whether its backward pass draws new random numbers.

A backward pass that recomputes parts of the forward must draw the same numbers as the forward. If the pass does so, it leaves torch's
generators unchanged, because a checkpoint with ``preserve_rng_state`` restores them. It leaves the counter of graphreg's noise unchanged,
too. Only under ``frozen_noise`` may the counter change, because every call then draws the same masks. Any other change of a generator or
the counter means that the pass drew new numbers. This works for compiled code, too. Only the generators of the CPU and of CUDA devices
are compared.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graphreg.runtime import Counter
from graphreg.torch_internals import Changes, wrap_engine


@dataclass
class Observed:
    """Counts made during the step.

    Attributes:
        backwards: The number of backward passes.
        forward: The number of calls of the module that drew from graphreg's streams, or moved its clock, and are not counted in ``again``.
        again: The number of such calls within a backward pass, but not under ``frozen_noise``.
        moved: The number of backward passes that changed the state of one of torch's generators.
    """

    backwards: int = 0
    forward: int = 0
    again: int = 0
    moved: int = 0


def observe(module: nn.Module, counters: Sequence[Counter], step: Callable[[], Any]) -> Observed:
    """Run the step once and count its calls; restore parameters, buffers, gradients, modes and generators afterwards.

    ``counters``: the module's key rule and its clock, if it has them. The first of them counts the calls.
    """
    seen, counter = Observed(), next(iter(counters), None)
    before = _call(counter)
    with _left_as_it_was(module, counters), _watched(seen, counter):
        step()
        seen.forward = _call(counter) - before - seen.again
    return seen


@contextmanager
def _watched(seen: Observed, counter: Counter | None) -> Iterator[None]:
    """Add to ``seen`` what each backward pass draws, until the block ends. A pass within another pass counts as part of the outer one."""
    running = False

    def watching(run: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap ``run``, which runs autograd's engine, to count what its outermost calls draw."""

        def watched(*args: Any, **kwargs: Any) -> Any:
            nonlocal running
            if running:
                return run(*args, **kwargs)
            running, state, call = True, _generators(), _call(counter)
            try:
                return run(*args, **kwargs)
            finally:
                running = False
                seen.backwards += 1
                seen.moved += any(not torch.equal(a, b) for a, b in zip(state, _generators(), strict=False))
                seen.again += _call(counter) - call if counter is not None and counter.frozen_call is None else 0

        return watched

    with Changes() as changes, changes:
        wrap_engine(changes, watching)
        yield


def _call(counter: Counter | None) -> int:
    return 0 if counter is None else int(counter.step)


def _generators() -> list[Tensor]:
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [])]  # type: ignore[no-untyped-call]


@contextmanager
def _left_as_it_was(module: nn.Module, counters: Sequence[Counter]) -> Iterator[None]:
    """Restore modes, parameters, buffers, gradients and generators at the end of the block.

    ``counters``: as in ``observe``. They are no submodules of ``module`` if ``module`` belongs to a model that is regularized in place.

    For parameters and buffers, both the tensor objects and their values are restored: a compiled forward assigns new buffers, and batch
    norm and optimizers write into tensors.
    """
    modes = [(m, m.training) for m in module.modules()]
    places: list[tuple[dict[str, Any], str, Tensor, Tensor]]
    inner = dict.fromkeys([*module.modules(), *counters])
    places = [(slots, name, t, t.detach().clone()) for m in inner for slots in (m._parameters, m._buffers)
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
