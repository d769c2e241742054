"""What surrounds a forward and a trace would lose: grad and autocast regions, generators, activation checkpointing."""

from __future__ import annotations

import logging
import random
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.utils.checkpoint as checkpointing

from graphreg.changes import Changes


def regions() -> tuple[bool, ...]:
    """What surrounds the code that runs now and changes what its operations do."""
    on = torch.is_autocast_enabled
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), on("cpu"), on("cuda")


def randomness() -> tuple[Any, bytes]:
    """The state of Python's and torch's generators."""
    with torch._C.DisableTorchFunction():  # it may be asked in the midst of a forward that is recorded
        return random.getstate(), torch.get_rng_state().numpy().tobytes()


def restore_randomness(state: tuple[Any, bytes]) -> None:
    random.setstate(state[0])
    torch.set_rng_state(torch.frombuffer(bytearray(state[1]), dtype=torch.uint8))


@contextmanager
def quiet(logger: str, level: int = logging.ERROR) -> Iterator[None]:
    """Without what one of torch's loggers says below ``level``, a screen of tracebacks, where the error that is raised says enough."""
    log = logging.getLogger(logger)
    with Changes() as changes, changes:
        changes.later(partial(log.setLevel, log.level))
        log.setLevel(level)
        yield


def checkpoints() -> dict[str, Any]:
    """What torch begins a checkpoint with that is not reentrant, by name: one function up to 2.14, from 2.15 on another behind it."""
    return {name: value for name, value in vars(checkpointing).items() if name.startswith("_checkpoint_without_reentrant_generator")}


@contextmanager
def checkpoints_refused() -> Iterator[None]:
    """Activation checkpointing is traced away otherwise; the module that asks for it is kept whole instead."""

    class Refused:
        apply = staticmethod(lambda *args: Refused())

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            raise RuntimeError("it checkpoints activations, which a trace would lose")

    with Changes() as changes, changes:
        for name in (*checkpoints(), "CheckpointFunction"):
            changes.put(checkpointing, name, Refused)
        yield


class ModuleStack(OrderedDict[str, Any]):
    """The modules that surround a call; fx copies it for each node, and ``copy.copy`` goes a long way round with its type."""

    def __copy__(self) -> OrderedDict[str, Any]:
        return OrderedDict(self)
