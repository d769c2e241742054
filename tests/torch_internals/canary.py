"""Helpers of the canaries, tests that private names of torch still behave as ``graphreg/torch_internals`` assumes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from graphreg.torch_internals.torch_modes import TorchDispatchMode

Look = Callable[[fx.GraphModule, list[Any]], None]


def compiled(function: Any, look: Look, **options: Any) -> Any:
    """Return the function, compiled by a backend that calls ``look`` with each graph and then runs the graph unchanged."""

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        look(gm, inputs)
        return gm.forward

    return torch.compile(function, backend=backend, **options)


def nothing(gm: fx.GraphModule, inputs: list[Any]) -> None:
    """Do nothing: a ``look`` for a canary that needs no graph."""


class Seen(TorchDispatchMode):
    """Notes the operators that run."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls = list[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls.append(str(func))
        return func(*args, **(kwargs or {}))
