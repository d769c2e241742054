"""Finds what can be controlled in what a user gives: the rewritten module in its wrappers, with its additions and graphs; a backend."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

from torch import fx

from graphreg.errors import GraphRegError
from graphreg.ir import RULES, NativeDropout, Operations, find_native_dropouts, state_of
from graphreg.runtime.build_record import BuildRecord
from graphreg.runtime.rewritten_module import RewrittenModule
from graphreg.runtime.runtime_module import Rules
from graphreg.torch_internals import backend_in, compile_record_of, function_in, original_of


def rewritten(module: Any) -> fx.GraphModule:
    """Return the rewritten module inside compiled and distributed wrappers; raises GraphRegError if there is none.

    A GraphModule that a torch.fx pass made of such a module's graph (``fx.GraphModule(module, graph)``) counts as one.
    """
    inner = module
    while not isinstance(inner, RewrittenModule):
        wrapped = original_of(inner)
        if wrapped is None and type(inner).__name__ in ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel"):
            wrapped = inner.module
        if wrapped is None:
            break
        inner = wrapped
    if not isinstance(inner, fx.GraphModule) or getattr(inner, RULES, None) is None:
        within = isinstance(getattr(inner, "module", None), RewrittenModule)
        hint = "There is one in its attribute 'module': give that." if within else "Give what graphreg.regularize returned."
        raise GraphRegError(f"{type(module).__name__} is not a module that graphreg rewrote. {hint}")
    return inner


def rules_of(module: Any) -> Rules:
    """Return the container of a rewritten module's runtime modules, also through compiled and distributed wrappers."""
    rules = getattr(rewritten(module), RULES)
    # a later pass that made a GraphModule took the runtime modules over one by one, without their container
    return rules if isinstance(rules, Rules) else next(child.rules[0] for child in rules.children())


def record_of(module: Any) -> BuildRecord:
    """How a rewritten module was made."""
    record = rules_of(module).build_record
    if record is None:
        raise GraphRegError("this module is not whole: its rewrite has not ended.")
    return record


def graphs_of(module: fx.GraphModule) -> dict[str, fx.Graph]:
    """Return a module's graphs by mode: ``both``, or ``train`` and ``eval``. A GraphModule that graphreg did not make has ``both``."""
    state = state_of(module)
    return state.graphs if state is not None else {"both": module.graph}


def native_draws(module: Any) -> tuple[NativeDropout, ...]:
    """Find the model's random operations that act and still draw from torch's generator, not from graphreg's streams."""
    inner = rewritten(module)
    native = find_native_dropouts(graphs_of(inner), Operations(inner), record_of(module).opaque)
    return tuple(each for each in native if each.when != "never" and each.rate != 0)


BACKEND = "graphreg_backend"  # where what torch.compile makes of a backend's name holds the backend


class Handle(ABC):
    """What can be asked and set of a rewritten module, or of a backend, while it is in use; ``controls.py`` says what each does."""

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
    def require_draws(self) -> None:
        """Raise GraphRegError for what draws no noise."""


class BackendHandle(Handle):
    """The handle of a backend, which is the backend itself. ``subgraphs``: its graphs."""

    subgraphs: list[Any]

    def __deepcopy__(self, memo: dict[int, Any]) -> BackendHandle:
        """Return itself, which compiled code refers to: once ``lightning`` is imported, ``torch.compile`` copies its arguments."""
        return self

    def require_draws(self) -> None:
        """A backend may capture a graph that draws at any call."""

    @abstractmethod
    def report(self) -> Any: ...


def backend_handle(target: object) -> BackendHandle | None:
    """Return the backend that ``target`` is, or was compiled with; None for anything else."""
    if isinstance(target, BackendHandle):
        return target
    inner = target if function_in(target) is not None else backend_in(compile_record_of(target))
    for candidate in (inner, function_in(inner), getattr(inner, BACKEND, None)):
        if isinstance(candidate, BackendHandle):
            return candidate
    return None
