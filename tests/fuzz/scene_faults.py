"""Faults that scenes should find: a stand-in that answers wrongly, arguments that are not compared, changes that are not noticed."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from fuzz.faults import FAULTS, fault, patched
from fuzz.later_faults import LATER

OF: dict[str, str] = {}  # by fault, the kind of scenes that find it
assert LATER  # those are registered first


def scene_fault(kind: str) -> Callable[[Callable[[], Iterator[None]]], Any]:
    """Register a fault that scenes of one kind should find."""

    def register(inject: Callable[[], Iterator[None]]) -> Any:
        made = fault(inject)
        OF[list(FAULTS)[-1]] = kind
        return made

    return register


@contextmanager
def unproved() -> Iterator[None]:
    """Wherever a graph is compared with its model before it is used, they are found the same."""
    with ExitStack() as stack:
        if importlib.util.find_spec("graphreg.tracing.proof") is not None:
            stack.enter_context(patched("tracing.proof.proof", "_differing", lambda was: lambda *args, **more: ""))
        yield


@scene_fault("asks")
def a_stand_in_that_is_no_tensor() -> Iterator[None]:
    def wrap(was: Any) -> Any:
        return lambda value, kinds: kinds is not torch.Tensor and was(value, kinds)

    with unproved(), patched("tracing.isinstance_patch", "traced_isinstance", wrap):
        yield


@scene_fault("asks")
def a_length_one_too_large() -> Iterator[None]:
    with unproved(), patched("tracing.shape_decisions:DecisionTracer", "length", lambda was: lambda self, value: was(self, value) + 1):
        yield


@scene_fault("asks")
def sizes_that_are_no_numbers() -> Iterator[None]:
    with unproved(), patched("tracing.isinstance_patch", "number_isinstance", lambda was: lambda value, kinds: False):
        yield


@scene_fault("kinds")
def one_structure_for_all_arguments() -> Iterator[None]:
    with patched("in_place.calls:CallForm", "key", lambda was: lambda self, args, kwargs, loosened=(): ""):
        yield


@scene_fault("kinds")
def arguments_that_are_not_compared() -> Iterator[None]:
    with patched("runtime.forward", "settle_structure", lambda was: lambda *args: None):
        yield


@scene_fault("changes")
def a_model_that_never_changes() -> Iterator[None]:
    with patched("in_place.fingerprint:Fingerprint", "same", lambda was: lambda self, *args: True):
        yield


@scene_fault("inserted")
def names_that_count_all_operations() -> Iterator[None]:
    def wrap(was: Any) -> Any:
        return lambda self, base: was(self, base) if len(self._order) % 2 else self._take(f"{base}_{len(self._order) + 1}")

    with patched("ir.naming:Namer", "_count", wrap):
        yield


@scene_fault("inserted")
def streams_that_count_what_was_made_before() -> Iterator[None]:
    def wrap(was: Any) -> Any:
        made = itertools.count()
        return lambda seed, *rest: was(seed + next(made), *rest)

    with patched("session.streams", "stream", wrap):
        yield


__all__ = ["OF", "unproved"]
