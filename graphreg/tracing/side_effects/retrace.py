"""One trace, and another one where there is reason to think that the next call computes something else: that is refused.

A graph computes the same at each call. A forward that reads what earlier calls of it left behind does not, and no more does one that
reads what a submodule, which is kept whole and so runs at each call, changes in its turn.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from torch import fx, nn

from graphreg.errors import TraceError, first_line
from graphreg.ir import Aliases, Operations, compared, difference
from graphreg.torch_internals import Changes, raise_interrupt
from graphreg.tracing.side_effects.opaque import Lost, unseen
from graphreg.tracing.side_effects.reach import reached
from graphreg.tracing.side_effects.snapshot import Before

_T = TypeVar("_T")
_SHOWN = 4  # names in a sentence


@contextmanager
def left_as_it_was(model: nn.Module) -> Iterator[Before]:
    """Puts back whatever running a forward on proxies may have changed of the model, and of what its code reaches."""
    before = Before(model)
    with Changes() as changes, changes:
        changes.later(before.put_back)
        yield before


def once_and_for_all(model: nn.Module, trace: Callable[[], fx.Graph], leaves: dict[str, str], run: bool) -> fx.Graph:
    """The graph of a call; refused where the call after it would be another.

    ``leaves``: the submodules kept whole, which may get more; ``run``: whether these run in a trace, for their results.
    """
    with left_as_it_was(model) as before:
        if one_way := [name for name, key in before.one_way.items() if _mentions(model, {} if run else leaves, key)]:
            raise Forgetful(model, one_way, leaves, " (it moves on as it is read, and nobody can put it back)")
        known = len(leaves)
        graph = trace()
        if len(leaves) > known:  # it is traced once more, and these not at all
            return graph
        if drawn := [name for name in before.drawn() if not _left_out(model, name, leaves)]:
            raise Forgetful(model, drawn, leaves, "")
        if registered := before.registered():
            raise Forgetful(model, registered, leaves, " (it registers what a module has, or puts another in its place)")
        changed = before.changed()
        if changed or before.tables() or before.reach.clocks:
            _repeated(model, graph, trace, before, changed, leaves)
            if len(leaves) > known:
                return graph
    _alone(model, graph, trace, leaves)
    return graph


def _repeated(
    model: nn.Module, graph: fx.Graph, trace: Callable[[], fx.Graph], before: Before, changed: list[str], leaves: dict[str, str]
) -> None:
    """Trace again from where the first trace has left the model."""
    tables, known = before.tables(), len(leaves)
    told = changed or tables or ["what it asks of a clock or the like"]
    try:
        again = [trace()]
        if before.counting():
            again.append(trace())
    except Exception as error:
        raise_interrupt(error)
        raise Forgetful(model, told, leaves, f" ({first_line(error)})") from error
    if len(leaves) > known:  # a submodule could not be traced where the first trace has left it: it is kept whole from now on
        return
    if moved := before.moved() or [name for other in again for name in _written(model, other, tables)]:
        raise Forgetful(model, moved, leaves, "")
    for other in again if changed or before.reach.clocks else ():
        if found := difference(graph, other):
            raise Forgetful(model, told, leaves, f" ({found[1]})")


def _written(model: nn.Module, graph: fx.Graph, tables: Sequence[str]) -> list[str]:
    """Those of these attributes whose tensors the graph writes into. Into others of them it could not: the trace would have raised."""
    if not tables:
        return []
    aliases, names = Aliases(graph, Operations(model)), {name.removeprefix("self."): name for name in tables}
    reads = [node for node in graph.nodes if node.op == "get_attr" and node.target in names]
    return [names[str(node.target)] for node in reads if aliases.written_later(node, surely=True)]


def _alone(model: nn.Module, graph: fx.Graph, trace: Callable[[], fx.Graph], leaves: dict[str, str]) -> None:
    """Trace again with everything gone that submodules kept whole change at each call: nobody else may read it."""
    modules = unseen(model, leaves)
    if not modules:
        return
    with left_as_it_was(model) as before:
        lost, known = Lost(before).of(modules), len(leaves)
        if not lost:
            return
        how = ""
        try:
            found = difference(graph, trace())
        except Exception as error:
            raise_interrupt(error)
            how, found = f" ({first_line(error)})", ("", "")
    names = _listed(lost)
    how = how or (f" ({found[1]})" if found else "")
    if found is None or len(leaves) > known:  # what reads it is kept whole from now on
        return
    if found[0] and found[0] not in leaves and found[0] in dict(model.named_modules()):
        leaves[found[0]] = f"it reads {names}, which a submodule that is kept whole changes"
        return
    raise TraceError(
        f"{type(model).__name__}.forward reads what a submodule changes that is kept whole{how}: {names}. A graph would "
        "have what that was when it was traced. Return it from that submodule's forward, make it a buffer there (register_buffer), or "
        "read it in a submodule of its own, which graphreg then keeps whole."
    )


def same_graph(graph: fx.Graph, trace: Callable[[], fx.Graph]) -> bool:
    """Whether another trace gives the same graph."""
    try:
        return compared(graph, trace()) == (True, {})
    except Exception as error:  # it goes a way that cannot be traced: another one
        raise_interrupt(error)
        return False


def keeping(traced: Callable[[], _T], leaves: dict[str, str]) -> _T | None:
    """None where a submodule must be kept whole first, for its forward is another at each call. Raises where the model's own is."""
    try:
        return traced()
    except Forgetful as error:
        if not error.paths or error.paths <= leaves.keys():
            raise
        leaves.update(dict.fromkeys(sorted(error.paths), "its forward changes what its next call reads"))
        return None


class Forgetful(TraceError):
    """Raised of what a forward leaves behind for its next call; ``paths``: of the submodules that alone do so, none where others do."""

    def __init__(self, model: nn.Module, changed: Sequence[str], leaves: dict[str, str], how: str) -> None:
        self.paths = _owners(model, changed, leaves)
        super().__init__(
            f"{type(model).__name__}.forward changes {_listed(changed)} for its next call, which then computes something else{how}; a "
            "graph computes the same at each call. Make it a buffer (register_buffer) that is changed in place (self.calls.add_(1)), or "
            "move that step into a submodule of its own, which graphreg then keeps whole."
        )


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _owners(model: nn.Module, names: Sequence[str], leaves: dict[str, str]) -> set[str]:
    """The paths of the submodules whose state these are, or whose code alone mentions them; none where that is not all."""
    modules, found = dict(model.named_modules()), set[str]()
    for name in names:
        path = name.removeprefix("self.").rpartition(".")[0] if name.startswith("self.") else ""
        while path and path not in modules:
            path = path.rpartition(".")[0]
        paths = {path} if name.startswith("self.") else _mentions(model, leaves, _key(name))
        if not paths or "" in paths:
            return set()
        found |= paths
    return found


def _left_out(model: nn.Module, stream: str, leaves: dict[str, str]) -> bool:
    """Whether no code that is traced draws from a generator of random numbers."""
    if stream == "numpy.random" and threading.active_count() > 1:  # another thread may have drawn from it
        return True
    return not _mentions(model, leaves, _key(stream))


def _key(name: str) -> str:
    return name.partition(",")[0].rpartition(".")[2]


def _mentions(model: nn.Module, leaves: dict[str, str], key: str) -> set[str]:
    """The paths of the modules, of those that are traced, whose code has this name in it."""
    known: dict[type, bool] = {}
    for module in model.modules():
        if type(module) not in known:
            known[type(module)] = key in reached([module]).mentioned
    return {path for path, module in model.named_modules() if known[type(module)] and not _within(path, leaves)}


def _within(path: str, leaves: dict[str, str]) -> bool:
    return any(path == leaf or path.startswith(f"{leaf}.") for leaf in leaves)
