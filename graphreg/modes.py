"""Both modes of a model: traced twice, told as one graph where literals alone differ, as two where structure does.

torch.fx evaluates ``self.training`` while it traces and freezes the answer into the graph; whoever traces in one
mode gets the other wrong in silence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import fx, nn
from torch.fx.node import map_aggregate

from graphreg.again import keeping, once_and_for_all
from graphreg.changes import Changes
from graphreg.comparison import Literals, compared, flat, name_of

Graphs = Mapping[str, fx.Graph]  # {"both": graph} or {"train": graph, "eval": graph}


def trace_modes(model: nn.Module, trace: Callable[[], fx.Graph]) -> Graphs:
    """``trace`` the model in train and in eval mode, and merge what it gives.

    Both traces put *every* submodule in the mode, so that what depends on a mode is seen to, whatever the user set
    apart. Only where structure differs must a submodule set apart be traced as it is set.
    """
    given = {module: module.training for module in model.modules()}
    train, evaluation = _in_mode(given, lambda m: True, trace), _in_mode(given, lambda m: False, trace)
    same, differing = compared(train, evaluation)
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


def trace_keeping(model: nn.Module, trace: Callable[[], fx.Graph], leaves: dict[str, str], run: bool) -> Graphs:
    """``trace_modes`` until no more submodules must be kept whole: a leaf of one mode is a leaf of both.

    ``leaves``: paths and reasons; ``run``: whether these modules run in a trace.
    """
    while True:
        before = len(leaves)
        graphs = keeping(lambda: trace_modes(model, lambda: once_and_for_all(model, trace, leaves, run)), leaves)
        if graphs is not None and len(leaves) == before:
            return graphs


def choose(training: bool, in_train: Any, in_eval: Any) -> Any:
    """The argument that belongs to the mode; stands in emitted code where a literal depends on it."""
    return in_train if training else in_eval


def _in_mode(given: Mapping[nn.Module, bool], mode: Callable[[nn.Module], bool], trace: Callable[[], fx.Graph]) -> fx.Graph:
    def back() -> None:
        for module, training in given.items():
            module.training = training

    with Changes() as changes, changes:
        changes.later(back)
        for module in given:
            module.training = mode(module)  # not .train(): a user's override of it may do more
        return trace()


def _read_modes(graph: fx.Graph, differing: Mapping[str, Literals]) -> None:
    """Replace each such literal by a read of the ``training`` of the module that owns the operation."""
    for node in list(graph.nodes):
        literals = differing.get(name_of(node))
        if not literals:
            continue
        owner = node.meta["site"][0] if "site" in node.meta else ""
        with graph.inserting_before(node):
            training = graph.create_node("get_attr", f"{owner}.training" if owner else "training")
            reads = {
                i: training if (a, b) == (True, False) and type(a) is type(b) is bool else graph.call_function(choose, (training, a, b))
                for i, (a, b) in literals.items()
            }
        position = iter(range(len(flat(node))))

        def replaced(leaf: Any, reads: Mapping[int, fx.Node] = reads, position: Iterator[int] = position) -> Any:
            return reads.get(next(position), leaf)

        node.args, node.kwargs = map_aggregate((node.args, node.kwargs), replaced)
