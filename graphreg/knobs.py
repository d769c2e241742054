"""What else has knobs than a rewritten module: a backend, which has no module of its own; and how to find it in what was compiled."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

from graphreg.summary import Report

KNOBS = "graphreg_knobs"  # where what torch.compile makes of a backend's name holds the backend


class Knobs(ABC):
    """What the functions of ``control.py`` and ``report.py`` ask of a backend in the place of a module. ``parts``: its graphs."""

    parts: list[Any]

    def __deepcopy__(self, memo: dict[int, Any]) -> Knobs:
        """Itself, whom compiled code knows: once ``lightning`` is imported, ``torch.compile`` copies all that it is given."""
        return self

    @abstractmethod
    def strengths(self) -> dict[str, float]: ...

    @abstractmethod
    def set_strength(self, name: str, value: float) -> None: ...

    @abstractmethod
    def rng_state(self) -> dict[str, Any]: ...

    @abstractmethod
    def set_rng_state(self, state: Mapping[str, Any]) -> None: ...

    @abstractmethod
    def set_ranks(self, ranks: Any) -> None: ...

    @abstractmethod
    def frozen_noise(self) -> AbstractContextManager[None]: ...

    @abstractmethod
    def noise_on(self) -> AbstractContextManager[None]: ...

    @abstractmethod
    def report(self) -> Report: ...


def knobs_of(given: object) -> Knobs | None:
    """The backend that was given, or that what was given is compiled with; None for anything else."""
    if isinstance(given, Knobs):
        return given
    inner = given if hasattr(given, "compiler_fn") else compiler_of(context_of(given))
    for found in (inner, getattr(inner, "compiler_fn", None), getattr(inner, KNOBS, None)):
        if isinstance(found, Knobs):
            return found
    return None


def context_of(compiled: object) -> object:
    """torch.compile's own record of what it compiled: of a module, of one that compiles itself, of a function."""
    context = vars(compiled).get("dynamo_ctx") if hasattr(compiled, "__dict__") else None
    if context is not None:
        return context
    wrapper = getattr(compiled, "_compiled_call_impl", None) or compiled
    names = getattr(getattr(wrapper, "__code__", None), "co_freevars", ())
    cells = getattr(wrapper, "__closure__", None) or ()
    return dict(zip(names, (cell.cell_contents for cell in cells), strict=False)).get("self") if "callback" in names else None


def compiler_of(context: object) -> object:
    """The backend as torch.compile was given it, inside torch's wrappers."""
    inner = getattr(context, "callback", None)
    while (wrapped := getattr(inner, "_torchdynamo_orig_backend", None) or getattr(inner, "__wrapped__", None)) is not None:
        inner = wrapped
    return inner
