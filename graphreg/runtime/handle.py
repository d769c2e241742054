"""Finds the rewritten module or the backend in an object that a user passes, which may be compiled or wrapped, or regularized in place.

``rules_of``, ``record_of`` and ``graphs_of`` then return the runtime modules, the build record and the graphs of the rewritten module.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import fx

from graphreg.errors import GraphRegError
from graphreg.ir import PLACED, RULES, Missing, NativeDropout, Operations, find_native_dropouts, state_of
from graphreg.planning import OwnDropout, Plan
from graphreg.regularizer import Regularizer
from graphreg.runtime.build_record import Asked, BuildRecord
from graphreg.runtime.rewritten_module import RewrittenModule
from graphreg.runtime.runtime_module import Rules
from graphreg.torch_internals import original_of
from graphreg.tracing import CapturedGraphs, captured_by


def rewritten(module: Any) -> fx.GraphModule:
    """Return the rewritten module inside compiled and distributed wrappers. Raise GraphRegError if they contain no rewritten module.

    A GraphModule that a torch.fx pass made of a rewritten module's graph (``fx.GraphModule(module, graph)``) counts as a rewritten module.
    For a model that is regularized in place, the result is the rewritten module of the model's last call.
    """
    inner = _unwrapped(module)
    if (placed := _placed_in(inner)) is not None:
        return placed.current()
    if not isinstance(inner, fx.GraphModule) or getattr(inner, RULES, None) is None:
        within = isinstance(getattr(inner, "module", None), RewrittenModule)
        hint = "Give its attribute 'module', which is such a module." if within else "Give what graphreg.regularize returned."
        raise GraphRegError(f"{type(module).__name__} is not a module that graphreg rewrote. {hint}")
    return inner


def regularized(module: Any) -> Any:
    """Return the rewritten module, or the model that is regularized in place, inside compiled and distributed wrappers."""
    inner = _unwrapped(module)
    return inner if _placed_in(inner) is not None else rewritten(module)


def _unwrapped(module: Any) -> Any:
    """Return what is inside compiled and distributed wrappers."""
    inner = module
    while not isinstance(inner, RewrittenModule):
        wrapped = original_of(inner)
        if wrapped is None and type(inner).__name__ in ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel"):
            wrapped = inner.module
        if wrapped is None:
            break
        inner = wrapped
    return inner


def rules_of(module: Any) -> Rules:
    """Return the container of a rewritten module's runtime modules, also through compiled and distributed wrappers."""
    rules = getattr(rewritten(module), RULES)
    # if a later pass made a GraphModule, torch.fx copied the runtime modules one by one, without their container
    return rules if isinstance(rules, Rules) else next(child.rules[0] for child in rules.children())


def record_of(module: Any) -> BuildRecord:
    """Return the record of how a rewritten module was made."""
    record = rules_of(module).build_record
    if record is None:
        raise GraphRegError("this module is incomplete: its rewrite has not finished.")
    return record


def graphs_of(module: fx.GraphModule) -> dict[str, fx.Graph]:
    """Return a module's graphs by mode: ``both``, or ``train`` and ``eval``. A GraphModule that graphreg did not make has only ``both``."""
    state = state_of(module)
    return state.graphs if state is not None else {"both": module.graph}


def native_draws(module: Any) -> tuple[NativeDropout, ...]:
    """Find the native dropouts that still draw from torch's generator. Leave out those that are never active and those with rate 0."""
    inner = rewritten(module)
    native = find_native_dropouts(graphs_of(inner), Operations(inner), record_of(module).opaque)
    return tuple(each for each in native if each.when != "never" and each.rate != 0)


class Handle(ABC):
    """Reads and sets strengths and noise of a rewritten module or a backend; ``controls.py`` documents each method."""

    @abstractmethod
    def strengths(self) -> dict[str, float]: ...

    @abstractmethod
    def site_strengths(self) -> dict[str, dict[str, float]]: ...

    @abstractmethod
    def set_strength(self, name: str, value: float | Mapping[str, float]) -> None: ...

    @abstractmethod
    def changed_strengths(self) -> dict[str, dict[str, float]]:
        """Return the strengths that were set since the regularizers were made, by regularizer and site; ``OWN`` means all other sites."""

    @abstractmethod
    def restore_strengths(self, changed: Mapping[str, Mapping[str, float]]) -> None:
        """Set the strengths that ``changed_strengths`` returned, and reset all others to what the regularizers were made with."""

    @abstractmethod
    def rng_state(self) -> dict[str, Any]: ...

    @abstractmethod
    def set_rng_state(self, state: Mapping[str, Any]) -> None: ...

    @abstractmethod
    def asked(self) -> Asked:
        """Return the arguments that the module or backend was made with; a recipe consists of them."""

    @abstractmethod
    def reset_state(self, names: Sequence[str]) -> None: ...

    @abstractmethod
    def set_ranks(self, ranks: Any) -> None: ...

    @abstractmethod
    def frozen_noise(self) -> AbstractContextManager[None]: ...

    @abstractmethod
    def noise_on(self) -> AbstractContextManager[None]: ...

    @abstractmethod
    def noise_off(self) -> AbstractContextManager[None]: ...

    @abstractmethod
    def penalties_off(self) -> AbstractContextManager[None]: ...

    @abstractmethod
    def require_draws(self) -> None:
        """Raise GraphRegError if the module draws no noise."""


class BackendHandle(Handle, CapturedGraphs):
    """Base class of backends: a backend is its own handle. ``subgraphs``: the graphs that Dynamo gave to the backend."""

    subgraphs: list[Any]

    def __deepcopy__(self, memo: dict[int, Any]) -> BackendHandle:
        """Return itself: ``torch.compile`` copies its arguments once ``lightning`` is imported, and compiled code refers to this object."""
        return self

    def require_draws(self) -> None:
        """Do nothing: at any later call, a backend may capture a graph that draws."""

    @abstractmethod
    def report(self) -> Any: ...

    @abstractmethod
    def planned(self, regularizers: Sequence[Regularizer], missing: Missing, own_dropout: OwnDropout) -> Plan:
        """Return what these regularizers would do in all graphs captured so far; without any, the plan of the backend's own."""


class InPlaceHandle(Handle):
    """Base class of the object that a model regularized in place keeps as its state. The object is also the model's handle."""

    @abstractmethod
    def current(self) -> RewrittenModule:
        """Return the rewritten module of the last call; raise GraphRegError if nothing was traced yet."""

    @abstractmethod
    def graph_for(self, model: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> RewrittenModule:
        """Return the rewritten module that a call of the model with these arguments would run; raise GraphRegError if there is none yet."""

    @abstractmethod
    def notes(self) -> list[str]:
        """Return lines for the report: one for each structure of arguments for which there is a graph."""


def in_place_handle(target: Any) -> InPlaceHandle | None:
    """Return the handle of a model that is regularized in place, also inside compiled and distributed wrappers; None for anything else."""
    return _placed_in(_unwrapped(target))


def _placed_in(inner: Any) -> InPlaceHandle | None:
    if isinstance(inner, InPlaceHandle):
        return inner
    placed = vars(inner).get(PLACED) if hasattr(inner, "__dict__") else None
    return placed if isinstance(placed, InPlaceHandle) else None


def backend_handle(target: object) -> BackendHandle | None:
    """Return ``target`` if it is a backend, or the backend that it was compiled with; None for anything else."""
    found = captured_by(target)
    return found if isinstance(found, BackendHandle) else None
