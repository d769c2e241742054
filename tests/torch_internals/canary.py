"""Helpers of the canaries, tests that private names of torch still behave as ``graphreg/torch_internals`` assumes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
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


class _Tested:
    """A value with a truth, which notes what ``look`` says of the frame that asks for it."""

    def __init__(self, answer: bool, look: Callable[[FrameType], Any], found: list[Any]) -> None:
        self._answer, self._look, self._found = answer, look, found

    def __eq__(self, other: object) -> Any:
        return self

    def __hash__(self) -> int:
        return id(self)

    def __bool__(self) -> bool:
        self._found.append(self._look(sys._getframe(1)))
        return self._answer


def answers_that_spare_errors(look: Callable[[FrameType], Any]) -> list[Any]:
    """Return what ``look`` says at each condition of a check. In a file of tests, pytest would rewrite the assertions."""
    found = list[Any]()
    yes, no = _Tested(True, look, found), _Tested(False, look, found)
    assert yes
    assert yes == 1 and yes == 2, "words"
    assert not no
    if no == 1:
        raise ValueError("many" if found else "few")
    if not yes:
        raise ValueError
    if no or no:
        raise ValueError
    return found


def answers_that_spare_none(look: Callable[[FrameType], Any]) -> list[Any]:
    """Return what ``look`` says at conditions behind which the code does something else than raise an error."""
    found = list[Any]()
    yes, no = _Tested(True, look, found), _Tested(False, look, found)
    if no:
        found.append("here")
    for _ in range(2):
        if yes:
            break
    found.append(None if (yes and 1) else "and")
    return found


def discards(look: Callable[[FrameType], Any]) -> list[Any]:
    """Return what ``look`` says of a call whose result is thrown away, and of one whose result is kept."""
    found = list[Any]()

    def called() -> None:
        found.append(look(sys._getframe(1)))

    called()
    kept = called()
    found.append(kept)
    return found[:2]
