"""Finds the rewritten module or the backend in an object that a user passes, which may be compiled or wrapped, or regularized in place.

``rules_of``, ``record_of`` and ``graphs_of`` then return the runtime modules, the build record and the graphs of the rewritten module.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, fx, nn

from graphreg.errors import GraphRegError
from graphreg.ir.module_record import PLACED, RULES, state_of
from graphreg.ir.operations import Operations
from graphreg.ir.random_ops import NativeDropout, find_native_dropouts
from graphreg.ir.selector import Missing
from graphreg.planning.native_dropout import OwnDropout
from graphreg.planning.plan import Plan
from graphreg.regularizer.base import Regularizer
from graphreg.runtime.build_record import BuildRecord
from graphreg.runtime.rewritten_module import RewrittenModule
from graphreg.runtime.runtime_module import Rules
from graphreg.session.session import NO_GRAPH, Session
from graphreg.torch_internals.modules import original_of
from graphreg.tracing.dynamo_graphs import CapturedGraphs, captured_by


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
        # By their names, so that none of them is imported.
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


class BackendHost(CapturedGraphs):
    """Base class of backends.

    Attributes:
        subgraphs: The graphs that Dynamo gave to the backend.
        runs: How many times one of them has run.
        model: The model without its wrappers; None until its first graph is captured.
        last: The penalties of the last call, by name; None until a call has ended.
    """

    session: Session
    subgraphs: list[Any]
    runs: int
    model: nn.Module | None
    last: dict[str, Tensor] | None

    def __deepcopy__(self, memo: dict[int, Any]) -> BackendHost:
        """Return itself: ``torch.compile`` copies its arguments once ``lightning`` is imported, and compiled code refers to this object."""
        return self

    @abstractmethod
    def penalties(self) -> dict[str, Tensor]: ...

    @abstractmethod
    def report(self) -> Any: ...

    @abstractmethod
    def planned(self, regularizers: Sequence[Regularizer], missing: Missing, own_dropout: OwnDropout) -> Plan:
        """Return what these regularizers would do in all graphs captured so far; without any, the plan of the backend's own."""


class InPlaceHost(ABC):
    """Base class of the object that a model regularized in place keeps as its state.

    Attributes:
        in_eval: Whether the model runs its graph in eval mode, too.
    """

    session: Session
    in_eval: bool

    @abstractmethod
    def modules(self) -> list[RewrittenModule]:
        """Return the rewritten modules of all structures of arguments, that of the last call first."""

    @abstractmethod
    def graph_for(self, model: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> RewrittenModule:
        """Return the rewritten module that a call of the model with these arguments would run; raise GraphRegError if there is none yet."""

    @abstractmethod
    def notes(self) -> list[str]:
        """Return lines for the report: one for each structure of arguments for which there is a graph."""

    def current(self) -> RewrittenModule:
        """Return the rewritten module of the last call; raise GraphRegError if nothing was traced yet."""
        if not (modules := self.modules()):
            raise GraphRegError(NO_GRAPH)
        return modules[0]


def session_of(target: Any) -> Session:
    """Return the session of a rewritten module, a model in place, a backend, or what torch.compile or a wrapper made of one of them.

    Raises:
        GraphRegError: graphreg did not rewrite the module.
    """
    host = backend_host(target) or in_place_host(target)
    session: Session = rules_of(target).session if host is None else host.session
    return session


def roots_of(target: Any) -> list[fx.GraphModule]:
    """Return the rewritten modules whose graphs run in calls of a target; none for a backend."""
    if backend_host(target) is not None:
        return []
    placed = in_place_host(target)
    return [rewritten(target)] if placed is None else [*placed.modules()]


def in_place_host(target: Any) -> InPlaceHost | None:
    """Return the state of a model that is regularized in place, also inside compiled and distributed wrappers; None for anything else."""
    return _placed_in(_unwrapped(target))


def _placed_in(inner: Any) -> InPlaceHost | None:
    if isinstance(inner, InPlaceHost):
        return inner
    # A user may pass anything.
    placed = vars(inner).get(PLACED) if hasattr(inner, "__dict__") else None
    return placed if isinstance(placed, InPlaceHost) else None


def backend_host(target: object) -> BackendHost | None:
    """Return ``target`` if it is a backend, or the backend that it was compiled with; None for anything else."""
    found = captured_by(target)
    return found if isinstance(found, BackendHost) else None
