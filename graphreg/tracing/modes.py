"""Both modes of a model: traced twice, told as one graph where literals alone differ, as two where structure does.

torch.fx evaluates ``self.training`` while it traces and freezes the answer into the graph; whoever traces in one
mode gets the other wrong in silence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import fx, nn
from torch.fx.node import has_side_effect, map_aggregate

from graphreg.errors import GraphRegError
from graphreg.ir import Graphs, Literals, choose, compared, flat, name_of
from graphreg.torch_internals import Changes, raise_interrupt
from graphreg.tracing.context import Asked
from graphreg.tracing.side_effects.retrace import keeping, once_and_for_all

_ONE_BY_ONE = 8  # submodules whose mode others ask for; each costs two traces
Owners = dict[tuple[str, int], str]  # by the name of a node and the position of a literal: whose mode decides it


def trace_modes(model: nn.Module, trace: Callable[[], fx.Graph], asked: Asked) -> Graphs:
    """``trace`` the model in train and in eval mode, and merge what it gives.

    Both traces put *every* submodule in the mode, so that what depends on a mode is seen to, whatever the user set
    apart. Only where structure differs must a submodule set apart be traced as it is set. ``asked`` gets the submodules whose mode
    others ask for.
    """
    given = {module: module.training for module in model.modules()}
    train, evaluation = _in_mode(given, lambda m: True, trace), _in_mode(given, lambda m: False, trace)
    same, differing = compared(train, evaluation)
    owners, asserted = _followed(model, trace, asked, train, evaluation) if asked else ({}, [])
    if same:
        _read_modes(train, differing, owners)
        _assert_modes(train, {path: _training(asked[path]) for path in asserted})
        return {"both": train}
    apart = {m for m, mode in given.items() if mode != model.training}
    if apart and model.training:
        train = _in_mode(given, lambda m: m not in apart, trace)
    elif apart:
        evaluation = _in_mode(given, lambda m: m in apart, trace)
    for graph, mode in ((train, True), (evaluation, False)):
        _read_modes(graph, differing, owners)
        set_apart = apart if mode == model.training else set()
        _assert_modes(graph, {path: (model.get_submodule(path) not in set_apart) == mode for path in asserted})
    return {"train": train, "eval": evaluation}


def _followed(
    model: nn.Module, trace: Callable[[], fx.Graph], asked: Asked, train: fx.Graph, evaluation: fx.Graph
) -> tuple[Owners, list[str]]:
    """Which literals go by the mode of a submodule that another module asks for it, and which such submodules decide more than that."""
    owners, asserted = Owners(), list[str]()
    for paths in [[path] for path in asked] if len(asked) <= _ONE_BY_ONE else [list(asked)]:
        try:
            turned, back = _turned(model, trace, paths, train, evaluation)
        except Exception as error:  # it goes a way that cannot be traced
            raise_interrupt(error)
            asserted += paths
            continue
        if turned == back == (True, {}):
            continue
        there = {name: {i: (b, a) for i, (a, b) in literals.items()} for name, literals in back[1].items()}
        if len(paths) == 1 and turned[0] and back[0] and turned[1] == there:
            owners |= {(name, i): paths[0] for name, literals in there.items() for i in literals}
        else:
            asserted += paths
    return owners, asserted


Compared = tuple[bool, dict[str, Literals]]


def _turned(
    model: nn.Module, trace: Callable[[], fx.Graph], paths: list[str], train: fx.Graph, evaluation: fx.Graph
) -> tuple[Compared, Compared]:
    """What differs from the graphs of both modes where these submodules alone are in the other mode."""
    given, alone = {module: module.training for module in model.modules()}, set(map(model.get_submodule, paths))
    turned = compared(train, _in_mode(given, lambda m: m not in alone, trace))
    return turned, compared(evaluation, _in_mode(given, lambda m: m in alone, trace))


def trace_keeping(model: nn.Module, trace: Callable[[], fx.Graph], leaves: dict[str, str], asked: Asked, run: bool) -> Graphs:
    """``trace_modes`` until no more submodules must be kept whole: a leaf of one mode is a leaf of both.

    ``leaves``: paths and reasons; ``asked``: what the traces tell of modes; ``run``: whether modules kept whole run in a trace.
    """
    while True:
        before = len(leaves)
        asked.clear()
        graphs = keeping(lambda: trace_modes(model, lambda: once_and_for_all(model, trace, leaves, run), asked), leaves)
        if graphs is not None and len(leaves) == before:
            return graphs




def _in_mode(given: Mapping[nn.Module, bool], mode: Callable[[nn.Module], bool], trace: Callable[[], fx.Graph]) -> fx.Graph:
    def back() -> None:
        for module, training in given.items():
            module.training = training

    with Changes() as changes, changes:
        changes.later(back)
        for module in given:
            module.training = mode(module)  # not .train(): a user's override of it may do more
        return trace()


@has_side_effect
def mode_asked(mode: bool, expected: bool, name: str) -> None:
    """Raises unless a submodule whose mode another module asks for is in the mode that the graph was traced in."""
    if mode != expected:
        raise GraphRegError(
            f"the model's forward asks self.{name}.training and goes by the answer. Here that is {mode}, and the graph was traced where it "
            f"is {expected}. Put {name} and what asks in one mode, or regularize with {name} in the mode that it is to have."
        )


def _assert_modes(graph: fx.Graph, expected: Mapping[str, bool | str]) -> None:
    """``expected``: a mode, or the module attribute that has it."""
    behind = next((node for node in graph.nodes if node.op != "placeholder"), graph.output_node())
    with graph.inserting_before(behind):
        for path, mode in expected.items():
            wanted = graph.create_node("get_attr", mode) if isinstance(mode, str) else mode
            read = graph.create_node("get_attr", _training(path))
            for node in (read, *([wanted] if isinstance(wanted, fx.Node) else ()), graph.call_function(mode_asked, (read, wanted, path))):
                node.meta["site"] = ("", ())


def _training(path: str) -> str:
    return f"{path}.training" if path else "training"


def _read_modes(graph: fx.Graph, differing: Mapping[str, Literals], owners: Owners) -> None:
    """Replace each such literal by a read of the ``training`` of the module that owns the operation, or of the one it asks."""
    for node in list(graph.nodes):
        literals = differing.get(name_of(node))
        if not literals:
            continue
        home, name = node.meta["site"][0] if "site" in node.meta else "", name_of(node)
        reads = dict[int, fx.Node]()
        with graph.inserting_before(node):
            for i, (a, b) in literals.items():
                training = graph.create_node("get_attr", _training(owners.get((name, i), home)))
                plain = (a, b) == (True, False) and type(a) is type(b) is bool
                reads[i] = training if plain else graph.call_function(choose, (training, a, b))
        position = iter(range(len(flat(node))))

        def replaced(leaf: Any, reads: Mapping[int, fx.Node] = reads, position: Iterator[int] = position) -> Any:
            return reads.get(next(position), leaf)

        node.args, node.kwargs = map_aggregate((node.args, node.kwargs), replaced)
