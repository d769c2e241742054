"""Finds what has the graphs that Dynamo captured of a compiled model: a backend, whose class is in a room below (``dynamo_backend``)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import nn

from graphreg.torch_internals.dynamo import backend_in, compile_record_of, function_in
from graphreg.tracing.trace import Traced

# torch.compile(backend="graphreg") wraps the backend's name in an object. This attribute of the
# object has the backend.
BACKEND = "graphreg_backend"


class CapturedGraphs(ABC):
    """Has the graphs that Dynamo captured of one model."""

    @abstractmethod
    def traced(self) -> Traced:
        """Return the sites of all graphs captured so far. Raise GraphRegError if there are none."""

    @abstractmethod
    def traced_on(self, model: nn.Module, example_inputs: Any) -> Traced:
        """Return the sites of the graphs that Dynamo captures in one call of a copy of a model."""


def captured_by(target: object) -> CapturedGraphs | None:
    """Return ``target`` if it has captured graphs, or the backend that it was compiled with; None for anything else."""
    if isinstance(target, CapturedGraphs):
        return target
    inner = target if function_in(target) is not None else backend_in(compile_record_of(target))
    for candidate in (inner, function_in(inner), getattr(inner, BACKEND, None)):
        if isinstance(candidate, CapturedGraphs):
            return candidate
    return None
