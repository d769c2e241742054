"""Traces a forward a second time if its next call may compute something else, and refuses the forward if the graphs differ.

A graph computes the same at each call. A forward may compute something else at its next call if it
reads what its earlier calls left behind, or what an opaque module changes when it runs.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from torch import fx, nn

from graphreg.errors import TraceError, first_line, listed
from graphreg.ir.aliasing import Aliases
from graphreg.ir.comparison import compared, graph_difference
from graphreg.ir.operations import Operations
from graphreg.torch_internals.modules import forward_hooks, modules_by_path
from graphreg.torch_internals.patching import Changes, raise_interrupt
from graphreg.tracing.global_queries import ModeReads
from graphreg.tracing.side_effects.imports import follow_imports
from graphreg.tracing.side_effects.opaque_modules import (
    FunctionNeeded,
    OpaqueState,
    hooks_leave_stale_values,
    opaque_functions,
    untraced_modules,
)
from graphreg.tracing.side_effects.reachable_state import reachable_code
from graphreg.tracing.side_effects.snapshot import Snapshot, assignments_noted

_T = TypeVar("_T")
_SHOWN = 4  # how many names a message lists
_ANY = 30  # from so many attributes on, an error names the modules that have them


@contextmanager
def model_restored(model: nn.Module, earlier: Snapshot | None = None) -> Iterator[Snapshot]:
    """Restore, at the end of the block, what a traced forward changed in the model and in all state that its code can reach.

    ``earlier``: a snapshot of a block around this one, since which nothing but modes has changed for good. It saves another one.
    """
    before = earlier if earlier is not None and earlier.serves_again() else Snapshot(model)
    with Changes() as changes, changes:
        if before is earlier:
            changes.later(before.take_modes())
        else:
            follow_imports(changes, before.follow_imports)
        changes.later(before.restore)
        yield before


def trace_repeatable(
    model: nn.Module, trace: Callable[[], fx.Graph], opaque: dict[str, str], mode_reads: ModeReads, run: bool,
    earlier: Snapshot | None = None,
) -> fx.Graph:  # fmt: skip
    """Trace a model and return the graph. Raise if a trace of the next call would give another graph.

    Args:
        model: The model.
        trace: Traces the model.
        opaque: The opaque modules by path, with reasons. Modules that turn out to be opaque are
            added.
        mode_reads: Filled with the modes (``training``) that the forward reads.
        run: Whether opaque modules run during a trace.
        earlier: As in ``model_restored``.

    Raises:
        StatefulForward: The forward changes what its next call reads.
        TraceError: The forward reads what an opaque module changes.
    """
    with model_restored(model, earlier) as before:
        if irreversible := [name for name, key in before.irreversible.items() if _modules_mentioning(model, {} if run else opaque, key)]:
            raise StatefulForward.of(model, irreversible, opaque, " (it advances when it is read, and cannot be restored)")
        known = len(opaque)
        graph = trace()

        # Code that mentions these may read a mode unnoticed, as may a class that defines ``training``.
        kinds = {kind for module in model.modules() for kind in type(module).__mro__ if kind is not nn.Module}
        is_noticed = before.code.mentioned.isdisjoint(("__dict__", "vars")) and not any("training" in vars(kind) for kind in kinds)
        if not is_noticed:
            mode_reads.any = True
            mode_reads.paths.update(dict.fromkeys(modules_by_path(model)))

        # the caller traces again, without the code of the new opaque modules
        if len(opaque) > known:
            return graph

        # Code that is not traced may have drawn, or another thread: both are no draws of the graph.
        drawn_generators = [name for name in before.drawn_generators() if _modules_mentioning(model, opaque, _last_name(name))]
        if threading.active_count() > 1:
            drawn_generators = [name for name in drawn_generators if name != "numpy.random"]
        if drawn_generators:
            raise StatefulForward.of(model, drawn_generators, opaque, "")
        if registered := before.registered():
            raise StatefulForward.of(model, registered, opaque, " (it registers a parameter, buffer or module, or replaces one)")
        changed = before.changed()
        if changed or _outside(opaque, before.assigned_tensors()) or before.code.clocks:
            _check_next_call(model, graph, trace, before, changed, opaque)
            if len(opaque) > known:
                return graph
        else:
            before.nothing_ran()
    _erase_behind_output(graph)
    _check_opaque_state(model, graph, trace, opaque)
    return graph


def _check_next_call(
    model: nn.Module, graph: fx.Graph, trace: Callable[[], fx.Graph], before: Snapshot, changed: list[str], opaque: dict[str, str]
) -> None:
    """Trace again from the state that the first trace left behind; raise StatefulForward if that gives another graph."""
    tables, known = _outside(opaque, before.assigned_tensors()), len(opaque)
    changes = changed or tables
    try:
        again = [trace()]
        if before.mark_counters():
            again.append(trace())
    except Exception as error:
        raise_interrupt(error)
        raise StatefulForward.of(model, changes, opaque, f" ({first_line(error)})") from error
    # a submodule could not be traced from the state that the first trace left behind; it has become
    # opaque
    if len(opaque) > known:
        return
    if reassigned := _outside(opaque, before.reassigned()) or [name for other in again for name in _written(model, other, tables)]:
        raise StatefulForward.of(model, reassigned, opaque, "")
    for each in (graph, *again):
        _erase_behind_output(each)
    differing = _first_difference(graph, again) if changed or before.code.clocks else None
    if differing and tables:
        # the first trace has made tables that the others found: compare with a first trace that finds them, too
        before.put_back(but_tables=True)
        if (found := _traced_or_none(trace)) is not None and len(opaque) == known:
            _erase_behind_output(found)
            differing = _first_difference(found, again)
    if differing and len(opaque) == known:
        raise StatefulForward.of(model, changes, opaque, f" ({differing[1]})")


def _first_difference(graph: fx.Graph, others: Sequence[fx.Graph]) -> tuple[str, str] | None:
    return next(filter(None, (graph_difference(graph, other) for other in others)), None)


def _traced_or_none(trace: Callable[[], fx.Graph]) -> fx.Graph | None:
    try:
        return trace()
    except Exception as error:  # the forward does not expect the tables
        raise_interrupt(error)
        return None


def _erase_behind_output(graph: fx.Graph) -> None:
    """Erase nodes that were recorded after the forward.

    Sizes that it used as keys of a dict are compared when the dict is restored, and the next trace may compute with what it left behind.
    """
    for node in reversed(list(graph.nodes)):
        if node.op == "output":
            return
        graph.erase_node(node)


def _outside(opaque: dict[str, str], names: list[str]) -> list[str]:
    """Return the names of state that is not within opaque modules. These run to learn what kind of value they return, and at each call."""
    within = tuple(f"self.{path}." for path in opaque)
    return [name for name in names if not name.startswith(within)]


def _written(model: nn.Module, graph: fx.Graph, tables: Sequence[str]) -> list[str]:
    """Return the names of those attributes among ``tables`` whose tensors the graph writes into."""
    if not tables:
        return []
    aliases, names = Aliases(graph, Operations(model)), {name.removeprefix("self."): name for name in tables}
    reads = [node for node in graph.nodes if node.op == "get_attr" and node.target in names]
    return [names[str(node.target)] for node in reads if aliases.written_later(node, is_definite=True)]


def _check_opaque_state(model: nn.Module, graph: fx.Graph, trace: Callable[[], fx.Graph], opaque: dict[str, str]) -> None:
    """Trace again while the state that opaque modules change is hidden. A submodule that reads such state becomes opaque too.

    Raises:
        TraceError: The model's own forward reads such state.
    """
    modules, functions = untraced_modules(model, opaque), opaque_functions(opaque)
    if not modules and not functions:
        return

    # what is hidden is not assigned by the forward
    with assignments_noted(), model_restored(model) as before:
        called = {str(node.target) for node in graph.nodes if node.op == "call_module"}
        within = {id(module) for path in called for module in model.get_submodule(path).modules()}
        hidden, known = OpaqueState(before).hide(modules, functions, within), len(opaque)
        if not hidden and not any(map(forward_hooks, modules)):
            return
        reason = ""
        try:
            with hooks_leave_stale_values():
                differing = graph_difference(graph, trace())
        except Exception as error:
            raise_interrupt(error)
            reason, differing = f" ({first_line(error)})", ("", "")
    owners = [f"self.{path} ({opaque[path]})" for path in opaque if any(name.startswith(f"self.{path}.") for name in hidden)]
    # code that assigns by ``setattr`` or the like may change any attribute, and a list of all would say nothing
    names = listed(owners if owners and len(hidden) > _ANY else hidden, _SHOWN)

    reason = reason or (f" ({differing[1]})" if differing else "")
    # no traced code reads the state, or the submodule that reads it has become opaque
    if differing is None or len(opaque) > known:
        return

    if differing[0] and differing[0] not in opaque and differing[0] in dict(model.named_modules()):
        opaque[differing[0]] = f"it reads {names}, which an opaque module changes"
        return
    raise TraceError(
        f"{type(model).__name__}.forward reads what an opaque {'module' if modules else 'function'} changes{reason}: {names}. A graph "
        "would contain its value at the "
        "time of the trace. Return it from that module's forward, make it a buffer there (register_buffer), or read it in a submodule "
        "of its own, which then becomes an opaque module."
    )


def same_graph(graph: fx.Graph, trace: Callable[[], fx.Graph]) -> bool:
    """Return whether another trace gives the same graph; False if that trace fails."""
    try:
        return compared(graph, trace()) == (True, {})
    except Exception as error:  # the forward takes a branch that cannot be traced
        raise_interrupt(error)
        return False


def or_make_opaque(trace: Callable[[], _T], opaque: dict[str, str]) -> _T | None:
    """Return what ``trace`` returns. If submodules turn out to be stateful, make them opaque and return None: the caller traces again.

    Raises:
        StatefulForward: The model's own forward is stateful.
    """
    try:
        return trace()
    except StatefulForward as error:
        if not makes_opaque(error, opaque):
            raise
        opaque.update(dict.fromkeys(sorted(error.paths), "its forward changes what its next call reads"))
        return None
    except FunctionNeeded as needed:
        opaque.update(needed.opaque)
        return None


def makes_opaque(error: StatefulForward, opaque: dict[str, str]) -> bool:
    """Return whether the forward is no longer stateful if further submodules are opaque."""
    return bool(error.paths - opaque.keys())


class StatefulForward(TraceError):
    """A forward changes what its next call reads.

    Attributes:
        paths: The paths of the submodules that change such state; empty if code outside of
            submodules changes some, too.
    """

    def __init__(self, message: str, paths: Collection[str] = ()) -> None:
        super().__init__(message)
        self.paths = set(paths)

    @classmethod
    def of(cls, model: nn.Module, changed: Sequence[str], opaque: dict[str, str], reason: str) -> StatefulForward:
        """Return the error, with its message.

        Args:
            model: The model.
            changed: The names of the state that changes; empty if no change was found, as when the
                forward reads a clock.
            opaque: The opaque modules by path, with reasons.
            reason: How the change was noticed, in parentheses, or ``""``.
        """
        why = (
            f"changes {listed(changed, _SHOWN)} for its next call, which may then compute something else{reason}" if changed
            else f"computes something else at its next call{reason}, because it reads something that changes, such as a clock"
        )  # fmt: skip
        is_drawn = any(_last_name(name) == "random" for name in changed)
        kept = "Make it a buffer (register_buffer) that is changed in place (self.calls.add_(1))"
        cure = "Draw by torch's functions" if is_drawn else kept
        return cls(
            f"{type(model).__name__}.forward {why}; a graph computes the same at each call. {cure}, or move that step into a submodule of "
            "its own, which then becomes an opaque module.",
            _submodules_of(model, changed, opaque),
        )


def _submodules_of(model: nn.Module, names: Sequence[str], opaque: dict[str, str]) -> set[str]:
    """Return the paths of the submodules that own or mention the named state; an empty set if other code owns or mentions it, too."""
    modules, owners = dict(model.named_modules()), set[str]()
    for name in names:
        path = name.removeprefix("self.").rpartition(".")[0] if name.startswith("self.") else ""
        while path and path not in modules:
            path = path.rpartition(".")[0]
        paths = {path} if name.startswith("self.") else _modules_mentioning(model, opaque, _last_name(name))
        if not paths or "" in paths:
            return set()
        owners |= paths
    return owners


def _last_name(name: str) -> str:
    """Return the name by which code mentions a place, such as ``step`` for ``self.head.step``."""
    return name.partition(",")[0].rpartition(".")[2]


def _modules_mentioning(model: nn.Module, opaque: dict[str, str], key: str) -> set[str]:
    """Return the paths of the modules whose code mentions a name. Opaque modules, and modules inside them, are left out."""
    known: dict[type, bool] = {}
    for module in model.modules():
        if type(module) not in known:
            known[type(module)] = key in reachable_code([module]).mentioned
    inside = tuple(f"{path}." for path in opaque)
    traced = {path: module for path, module in model.named_modules() if path not in opaque and not path.startswith(inside)}
    return {path for path, module in traced.items() if known[type(module)]}
