"""The state around a forward that decides what it computes: random generators, grad mode, torch's fast path of attention, caches."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from graphreg.torch_internals.modules import parameters_by_name, plain_transformers, without_cached_weights
from graphreg.torch_internals.other_threads import alone
from graphreg.torch_internals.patching import Changes

_FAST = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerEncoder)  # the layers that have a fast path


class Generators:
    """The states of the global random generators: Python's, torch's on all devices, and numpy's if numpy is imported."""

    def __init__(self) -> None:
        """Note the present states."""
        numpy: Any = sys.modules.get("numpy")
        self._python, self._torch = random.getstate(), torch.get_rng_state()
        # the question alone would initialize CUDA in a process that has not used it
        self._cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
        self._numpy = numpy.random.get_state() if numpy is not None else None

    def rewind(self) -> None:
        """Set those generators that have changed back to the noted states. Other threads use them, too, so the rest is left alone."""
        if random.getstate() != self._python:
            random.setstate(self._python)
        if not torch.equal(torch.get_rng_state(), self._torch):
            torch.set_rng_state(self._torch)
        if self._numpy is not None:
            sys.modules["numpy"].random.set_state(self._numpy)
        if self._cuda:
            torch.cuda.set_rng_state_all(self._cuda)


@contextmanager
def comparable_state(model: nn.Module) -> Iterator[Generators]:
    """Run the block so that a forward and its graph compute the same: with grad mode on, and without torch's fast path of attention.

    At the end of the block, the random generators get their old states back.

    Args:
        model: The model. If it has frozen attention, the fast path is switched off: it acts where no gradient is needed, and a graph does
            not take it.
    """
    generators = Generators()
    attention = [inner for inner in model.modules() if isinstance(inner, _FAST)]
    takes_fast_path = any(not any(parameter.requires_grad for parameter in inner.parameters()) for inner in attention)
    with Changes() as changes, changes, ExitStack() as stack:
        without_cached_weights(changes)
        if takes_fast_path:
            # the switch of the fast path is one for all threads
            alone(changes)
            plain_transformers(changes)
        # of tensors that are made in inference mode, autograd counts no writes
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.callback(generators.rewind)
        yield generators


def _devices(model: nn.Module) -> set[str]:
    """Return the types of devices for which a model may run under autocast, which knows no meta device."""
    return {"cpu", *(p.device.type for p in parameters_by_name(model).values())} - {"meta"}


@contextmanager
def plainly(model: nn.Module) -> Iterator[None]:
    """Within the block, autocast and inference mode are off."""
    with ExitStack() as stack:
        for device in _devices(model):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        yield


def autocast_again(model: nn.Module) -> Callable[[], AbstractContextManager[Any]]:
    """Return a function that gives a context with the autocast that is on now."""
    on = {device: torch.get_autocast_dtype(device) for device in _devices(model) if torch.is_autocast_enabled(device)}

    @contextmanager
    def around() -> Iterator[None]:
        with ExitStack() as stack:
            for device, dtype in on.items():
                stack.enter_context(torch.autocast(device, dtype))
            yield

    return around
