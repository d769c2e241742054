"""Runs a training step that the user gives, and detects whether a backward pass of the step draws new random numbers.

A backward pass that recomputes parts of the forward must draw the same numbers as the forward. Such
a pass leaves torch's generators unchanged, because a checkpoint with ``preserve_rng_state``
restores them. The pass also leaves the counter of graphreg's noise unchanged. Under
``frozen_noise`` the counter may change, because every call then draws the same masks. Any other
change of a generator or of the counter means that the pass drew new numbers. The comparison works
for compiled code, too. Only the generators of the CPU and of CUDA devices are compared.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graphreg.runtime.counter import Counter
from graphreg.torch_internals.autograd import wrap_engine
from graphreg.torch_internals.patching import Changes


@dataclass
class Observed:
    """Counts of the backward passes, and of the calls of the module, that ran during the step.

    Attributes:
        backwards: The number of backward passes.
        forward: The number of calls that advanced the counter and are not counted in ``again``.
        again: The number of calls within a backward pass that advanced the counter. Calls under
            ``frozen_noise`` are not counted here.
        moved: The number of backward passes that changed the state of a generator of torch.
    """

    backwards: int = 0
    forward: int = 0
    again: int = 0
    moved: int = 0


def observe(module: nn.Module, counters: Sequence[Counter], step: Callable[[], Any]) -> Observed:
    """Run the step once and count its calls; restore parameters, buffers, gradients, modes and generators afterwards.

    ``counters``: the module's ``KeyRule`` and ``ClockRule``, if the module has them. Only the first
    of them is compared.
    """
    seen, counter = Observed(), next(iter(counters), None)
    before = _call(counter)
    with _left_as_it_was(module, counters), _watched(seen, counter):
        step()
        seen.forward = _call(counter) - before - seen.again
    return seen


@contextmanager
def _watched(seen: Observed, counter: Counter | None) -> Iterator[None]:
    """Count in ``seen`` the backward passes of the block and their draws. A pass within another pass counts as part of the outer pass."""
    running = False

    def watching(run: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap ``run``, torch's function that runs autograd's engine: count the draws of each outermost call."""

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
                # If the pass is the first to use CUDA, the second list is longer.
                seen.moved += any(not torch.equal(a, b) for a, b in zip(state, _generators(), strict=False))
                # Under ``frozen_noise``, a repeated call has drawn the masks of the first one.
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

    ``counters``: as in ``observe``. If ``module`` is a graph of a model that is regularized in
    place, the counters are not submodules of ``module``, because all graphs of the model share
    them.

    Both the tensor objects and their values are restored. A compiled forward assigns new buffers,
    and batch norm and optimizers write into tensors.
    """
    modes = [(m, m.training) for m in module.modules()]
    places: list[tuple[dict[str, Any], str, Tensor, Tensor]]
    # A counter may be among the submodules, too; ``fromkeys`` keeps it once.
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
        # Otherwise the step would add its gradients to the user's tensors, in place.
        for p, _ in grads:
            p.grad = None
        with torch.random.fork_rng():
            yield
