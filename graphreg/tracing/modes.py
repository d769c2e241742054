"""Both modes of a model: traced twice, told as one graph where literals alone differ, as two where structure does.

torch.fx evaluates ``self.training`` while it traces and freezes the answer into the graph; whoever traces in one
mode gets the other wrong in silence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import fx, nn
from torch.fx.node import map_aggregate

from graphreg.errors import TraceError, first_line
from graphreg.ir import Graphs, choose, is_nan, own_labels, scope_of
from graphreg.torch_internals import Changes, raise_interrupt
from graphreg.tracing.side_effects import Before


@contextmanager
def left_as_it_was(model: nn.Module) -> Iterator[Before]:
    """Puts back whatever running a forward on proxies may have changed of the model."""
    before = Before(model)
    with Changes() as changes, changes:
        changes.later(before.put_back)
        yield before


def trace_modes(model: nn.Module, trace: Callable[[], fx.Graph]) -> Graphs:
    """``trace`` the model in train and in eval mode, and merge what it gives.

    Both traces put *every* submodule in the mode, so that what depends on a mode is seen to, whatever the user set
    apart. Only where structure differs must a submodule set apart be traced as it is set.
    """
    given = {module: module.training for module in model.modules()}
    train, evaluation = _in_mode(given, lambda m: True, trace), _in_mode(given, lambda m: False, trace)
    same, differing = _compared(train, evaluation)
    if same:
        _read_modes(train, differing)
        return {"both": train}
    apart = {m for m, mode in given.items() if mode != model.training}
    if apart and model.training:
        train = _in_mode(given, lambda m: m not in apart, trace)
    elif apart:
        evaluation = _in_mode(given, lambda m: m in apart, trace)
    for graph in (train, evaluation):
        _read_modes(graph, differing)
    return {"train": train, "eval": evaluation}


def trace_keeping(model: nn.Module, trace: Callable[[], fx.Graph], leaves: dict[str, str]) -> Graphs:
    """``trace_modes`` until no more submodules must be kept whole: a leaf of one mode is a leaf of both. ``leaves``: paths and reasons."""
    while True:
        before = len(leaves)
        try:
            graphs = trace_modes(model, trace)
        except Forgetful as error:
            if not error.path or error.path in leaves:
                raise
            leaves[error.path] = "its forward changes what its next call reads"
            continue
        if len(leaves) == before:
            return graphs




def _in_mode(given: Mapping[nn.Module, bool], mode: Callable[[nn.Module], bool], trace: Callable[[], fx.Graph]) -> fx.Graph:
    def back() -> None:
        for module, training in given.items():
            module.training = training

    with Changes() as changes, changes:
        changes.later(back)
        for module in given:
            module.training = mode(module)  # not .train(): a user's override of it may do more
        return _once_and_for_all(next(iter(given)), trace)


def _once_and_for_all(model: nn.Module, trace: Callable[[], fx.Graph]) -> fx.Graph:
    """The graph of a call; refused where the call after it would be another, for the forward counts or collects something."""
    with left_as_it_was(model) as before:
        graph = trace()
        changed = before.changed()
        if not changed and not before.tables():
            return graph
        try:
            again = [trace()]
            if before.counting():
                again.append(trace())
        except Exception as error:
            raise_interrupt(error)
            raise Forgetful(model, changed, f" ({first_line(error)})") from error
        if moved := before.moved():
            raise Forgetful(model, moved, "")
        if changed and any(_compared(graph, other) != (True, {}) for other in again):
            raise Forgetful(model, changed, "")
    return graph


def same_graph(graph: fx.Graph, trace: Callable[[], fx.Graph]) -> bool:
    """Whether another trace gives the same graph."""
    try:
        return _compared(graph, trace()) == (True, {})
    except Exception as error:  # it goes a way that cannot be traced: another one
        raise_interrupt(error)
        return False


class Forgetful(TraceError):
    """Raised of what a forward leaves behind for its next call; ``path``: of the submodule that alone does so, "" where none does."""

    def __init__(self, model: nn.Module, changed: Sequence[str], how: str) -> None:
        paths = {name.removeprefix("self.").rpartition(".")[0] if name.startswith("self.") else "" for name in changed}
        self.path = paths.pop() if len(paths) == 1 else ""
        if self.path not in dict(model.named_modules()):
            self.path = ""
        super().__init__(
            f"{type(model).__name__}.forward changes {', '.join(changed)} for its next call, which then computes something else{how}; a "
            "graph computes the same at each call. Make it a buffer (register_buffer) that is changed in place (self.calls.add_(1)), or "
            "move that step into a submodule of its own, which graphreg then keeps whole."
        )


def _name(node: fx.Node) -> str:
    labels = own_labels(node)
    return str(labels[0].name) if labels else f":{node.name}"  # no label has a colon there


def _flat(node: fx.Node) -> list[Any]:
    """The arguments as a flat list; positions agree between two calls of the same form."""
    flat: list[Any] = []
    map_aggregate((node.args, node.kwargs), flat.append)
    return flat


Literals = dict[int, tuple[Any, Any]]  # by position: in train, in eval


def _literals(a: fx.Node, b: fx.Node) -> tuple[Literals, bool] | None:
    """The literals that differ between two nodes, and whether these read the same values; None unless they are one operation.

    Where the values are others, as behind what each mode does in its own way, only flags count (``training=``).
    """
    if a.op != b.op or a.target != b.target or a.kwargs.keys() != b.kwargs.keys():
        return None
    ours, theirs = _flat(a), _flat(b)
    if len(ours) != len(theirs):
        return None
    found, same = Literals(), True
    for i, (x, y) in enumerate(zip(ours, theirs, strict=True)):
        if isinstance(x, fx.Node) != isinstance(y, fx.Node):
            return None
        if isinstance(x, fx.Node):
            same = same and _name(x) == _name(y)
        elif not _equal(x, y):
            found[i] = x, y
    return (found if same else {i: pair for i, pair in found.items() if type(pair[0]) is type(pair[1]) is bool}), same


def _compared(train: fx.Graph, evaluation: fx.Graph) -> tuple[bool, dict[str, Literals]]:
    """Whether the two are one structure, and the literals that differ in the operations that both have."""
    others = {_name(node): node for node in evaluation.nodes}
    found = {(name := _name(node)): _literals(node, others[name]) if name in others else None for node in train.nodes}
    same = list(found) == list(others) and len(found) == len(train.nodes) == len(evaluation.nodes)
    same = same and all(each is not None and each[1] for each in found.values())
    return same, {name: each[0] for name, each in found.items() if each is not None and each[0]}


def _equal(a: Any, b: Any) -> bool:
    return type(a) is type(b) and bool(a == b or (is_nan(a) and is_nan(b)))




def _read_modes(graph: fx.Graph, differing: Mapping[str, Literals]) -> None:
    """Replace each such literal by a read of the ``training`` of the module that owns the operation."""
    for node in list(graph.nodes):
        literals = differing.get(_name(node))
        if not literals:
            continue
        owner = scope_of(node)
        with graph.inserting_before(node):
            training = graph.create_node("get_attr", f"{owner}.training" if owner else "training")
            reads = {
                i: training if (a, b) == (True, False) and type(a) is type(b) is bool else graph.call_function(choose, (training, a, b))
                for i, (a, b) in literals.items()
            }
        position = iter(range(len(_flat(node))))

        def replaced(leaf: Any, reads: Mapping[int, fx.Node] = reads, position: Iterator[int] = position) -> Any:
            return reads.get(next(position), leaf)

        node.args, node.kwargs = map_aggregate((node.args, node.kwargs), replaced)
