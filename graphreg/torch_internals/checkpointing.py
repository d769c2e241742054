"""Activation checkpointing: calls a function before each checkpoint, unwraps checkpointed modules, and numbers recomputed regions."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch.utils.checkpoint as checkpointing
from torch import nn
from torch._higher_order_ops.wrap import uid

from graphreg.torch_internals.patching import Changes

WRAPPED_MODULE = "_checkpoint_wrapped_module"  # the attribute in which a wrapper made by ``checkpoint_wrapper`` holds its module


def before_checkpoints(changes: Changes, ask: Callable[[], None]) -> None:
    """Call ``ask`` before each activation checkpoint, until the block of ``changes`` ends. If ``ask`` raises, the checkpoint raises.

    A trace would run the checkpointed function once, and the graph would lose the checkpoint without notice. So both front ends (torch.fx
    and torch.export) pass an ``ask`` that raises during a trace. torch has no hook for the start of a checkpoint. So wrappers replace
    torch's functions that start one, in all threads.
    """

    def preceded(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            ask()
            return original(*args, **kwargs)

        return call

    for name, original in _begins().items():
        changes.put(checkpointing, name, preceded(original))
    function = checkpointing.CheckpointFunction
    changes.put(function, "apply", preceded(function.apply))


def through_checkpoints(changes: Changes, begin: Callable[[bool], Callable[[], None] | None]) -> None:
    """Run checkpointed functions without the checkpoint, until the block of ``changes`` ends.

    ``begin`` is called before each such function, with whether the checkpoint is reentrant, and returns what to call after the function. If
    it returns None, or if the checkpoint has a ``context_fn`` (a policy of what to keep), the checkpoint is left alone.
    """

    def through(original: Callable[..., Any]) -> Callable[..., Any]:
        def generator(*args: Any, **kwargs: Any) -> Any:
            given = inspect.signature(original).bind(*args, **kwargs).arguments
            plain = given.get("context_fn") in (None, checkpointing.noop_context_fn)
            end = begin(False) if plain else None
            return original(*args, **kwargs) if end is None else passed(end)

        return generator

    def passed(end: Callable[[], None]) -> Iterator[None]:
        yield  # the function runs here
        end()

    def apply(run: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
        if (end := begin(True)) is None:
            return reentrant(run, preserve_rng_state, *args)
        value = run(*args)
        end()
        return value

    for name, original in _begins().items():
        changes.put(checkpointing, name, through(original))
    function = checkpointing.CheckpointFunction
    reentrant: Any = function.apply
    changes.put(function, "apply", apply)


def _begins() -> dict[str, Any]:
    """Return torch's functions that start a non-reentrant checkpoint, by name: one up to torch 2.14, two from 2.15 on."""
    return {name: value for name, value in vars(checkpointing).items() if name.startswith("_checkpoint_without_reentrant_generator")}


def checkpoint_wrapped(module: nn.Module) -> nn.Module | None:
    """Return the module inside a wrapper that ``checkpoint_wrapper`` made; None for any other module."""
    if WRAPPED_MODULE not in module._modules:  # in a module of torch.jit this is no dict, and has no ``get``
        return None
    return module._modules[WRAPPED_MODULE]


def next_region() -> int:
    """Return a new id for a region of a graph that backward recomputes.

    Dynamo numbers the checkpoints in its graphs with the same counter, so no two regions get the same id.
    """
    return next(uid)
