"""Traces a model in train mode and in eval mode. Makes one graph if only literals differ, and two graphs if the structure differs.

torch.fx evaluates ``self.training`` while it traces and fixes the answer in the graph. So a trace in one mode would be silently wrong in
the other mode.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from typing import Any, TypeVar

from torch import fx, nn
from torch.fx.node import map_aggregate

from graphreg.ir.call_records import doubt_plain
from graphreg.ir.comparison import Literals, compared, flat, literals_between, name_of
from graphreg.ir.metadata import label_site, scope_of
from graphreg.ir.train_eval import ModeGraphs, choose, modes_asked, not_in_eval
from graphreg.torch_internals.modules import modules_by_path
from graphreg.torch_internals.patching import Changes, raise_interrupt
from graphreg.tracing.global_queries import ModeReads
from graphreg.tracing.side_effects.retrace import StatefulForward, makes_opaque, or_make_opaque, trace_repeatable
from graphreg.tracing.side_effects.snapshot import Snapshot

_T = TypeVar("_T")
_MAX_ONE_BY_ONE = 8  # up to this many submodules are examined one by one; each of them costs two traces
LiteralOwners = dict[tuple[str, int], str]  # maps (node name, position of a literal) to the path of the module whose mode decides it


Follow = Callable[[fx.Graph], dict[str, Literals] | None]  # compares a graph with the model's present mode, without another trace


def _never(graph: fx.Graph) -> None:
    """Stands for a ``Follow`` that is never certain."""


def trace_each_mode(
    model: nn.Module, trace: Callable[[], fx.Graph], mode_reads: ModeReads, follow: Follow = _never,
    left_out: Callable[[Exception], bool] = lambda error: False,
) -> ModeGraphs:  # fmt: skip
    """Trace the model in both modes, and merge the graphs if only literals differ. A forward that reads no mode is traced once.

    For each of the two traces, *every* submodule is put into the mode of the trace, to find everything that depends on a mode. But some
    submodules may be in another mode than the model (``model.encoder.eval()``). If there are such submodules and the two graphs differ in
    structure, the graph for the model's present mode is traced once more, with each submodule in its own mode.

    Args:
        model: The model.
        trace: Traces the model in its present mode.
        mode_reads: Filled by ``trace`` with the modes that the forward reads.
        follow: Returns the literals in which the graph of the last trace differs from the model's present mode, as ``compared`` does; None
            if there are other differences, or if that is not certain. Without it, the other mode is always traced.
        left_out: Returns whether eval mode is left out if its trace fails with this error, which is raised otherwise.

    Returns:
        ``{"both": graph}`` or ``{"train": graph, "eval": graph}``; ``{"train": graph}`` if eval mode is left out.
    """
    modes = {module: module.training for module in model.modules()}
    train = _in_mode(modes, lambda m: True, trace)
    if not mode_reads.any:
        return {"both": train}

    # To run the forward in eval mode along the graph of train mode takes half the time of a trace.
    if not mode_reads.readers and (literals := _in_mode(modes, lambda m: False, lambda: follow(train))) is not None:
        _read_modes(train, literals, _readers_themselves(model, literals, [train], mode_reads))
        if literals:
            doubt_plain(train, None)
        return {"both": train}

    read = {True: dict(mode_reads.paths)}
    mode_reads.paths.clear()
    try:
        evaluation = _in_mode(modes, lambda m: False, trace)
    except Exception as error:
        raise_interrupt(error)
        if not left_out(error):
            raise
        evaluation = None
    read[False] = dict(mode_reads.paths)
    mode_reads.paths.update(read[True])

    readers = mode_reads.readers
    same, differing, owners, asserted = False, dict[str, Literals](), LiteralOwners(), list(readers)
    if evaluation is not None:
        same, differing = compared(train, evaluation)
        owners, asserted = _mode_dependence(model, trace, readers, train, evaluation) if readers else ({}, [])
        owners = {**_readers_themselves(model, differing, [train, evaluation], mode_reads), **owners}
    if same:
        doubt_plain(train, evaluation)
        _read_modes(train, differing, owners)
        _assert_modes(train, {path: _training_path(readers[path]) for path in asserted})
        return {"both": train}

    # The user has put these submodules into another mode than the model, such as a frozen encoder.
    apart = {m for m, mode in modes.items() if mode != model.training}
    graphs = [graph for graph in (train, evaluation) if graph is not None]
    parts = _same_in_both(train, evaluation) if evaluation is not None else {}
    found = {}
    for mode, traced in zip((True, False), graphs, strict=False):
        own = [path for path in read[mode] if path and path not in readers]
        branching, literals = _own_modes(model, mode, traced, own, parts, trace, follow)
        # a node that is no site has a number for a name, which may be that of another node in the other graph
        literals |= {name: pairs for name, pairs in differing.items() if not name.startswith(":")}
        among = {**_readers_themselves(model, literals, [traced], mode_reads), **owners}
        # after ``train()`` or ``eval()`` all submodules have the mode of the model
        set_apart = apart if mode == model.training else set()

        def in_mode(module: nn.Module, mode: bool = mode, set_apart: set[nn.Module] = set_apart) -> bool:
            return (module not in set_apart) == mode

        graph = _in_mode(modes, in_mode, trace) if set_apart else traced
        _read_modes(graph, literals, among)
        _assert_modes(graph, {path: in_mode(model.get_submodule(path)) for path in (*asserted, *branching)})
        found["train" if mode else "eval"] = graph
    return found


def _same_in_both(train: fx.Graph, evaluation: fx.Graph) -> dict[str, bool]:
    """Return which modules have the same operations in both graphs, by path; a module that is in one graph alone is left out."""
    ours, theirs = _nodes_by_module(train), _nodes_by_module(evaluation)
    pairs = {path: [*zip_longest(ours[path], theirs[path])] for path in ours if path in theirs}
    return {path: all(None not in pair and literals_between(*pair) is not None for pair in each) for path, each in pairs.items()}


def _nodes_by_module(graph: fx.Graph) -> dict[str, list[fx.Node]]:
    """Return the nodes of a graph by the path of the module in whose forward they were made."""
    nodes = dict[str, list[fx.Node]]()
    for node in graph.nodes:
        nodes.setdefault(scope_of(node), []).append(node)
    return nodes


def _own_modes(
    model: nn.Module, mode: bool, graph: fx.Graph, paths: Sequence[str], parts: Mapping[str, bool], trace: Callable[[], fx.Graph],
    follow: Follow,
) -> tuple[Sequence[str], dict[str, Literals]]:  # fmt: skip
    """Find out what in the graph of one mode depends on the modes of submodules that these read themselves.

    Those that may decide nothing but literals are put into the other mode together: first with those that are in this graph alone, then
    without them. A submodule with other operations in the other mode, such as timm's batch norms, is not among them.

    Args:
        model: The model.
        mode: Whether the graph is that of train mode.
        graph: The graph.
        paths: The submodules.
        parts: What ``_same_in_both`` returns.
        trace, follow: As in ``trace_each_mode``.

    Returns:
        A pair: the paths of the submodules on whose modes the graph's structure may depend, and a dict of the literals that depend on those
        of the others.
    """
    modes = {module: module.training for module in model.modules()}
    for rest in dict.fromkeys(tuple(path for path in paths if parts.get(path, default)) for default in (True, False)):
        if not rest:
            continue
        alone = set(map(model.get_submodule, rest))

        def in_mode(module: nn.Module, alone: set[nn.Module] = alone) -> bool:
            return (module not in alone) == mode

        try:
            literals = _in_mode(modes, in_mode, lambda: follow(graph))
            same, other = (True, literals) if literals is not None else compared(graph, _in_mode(modes, in_mode, trace))
        except Exception as error:  # the forward takes a branch that cannot be traced
            raise_interrupt(error)
            continue
        if same:
            ordered = other if mode else {name: {i: (b, a) for i, (a, b) in found.items()} for name, found in other.items()}
            return [path for path in paths if path not in rest], ordered
    return paths, {}


def _readers_themselves(
    model: nn.Module, literals: Mapping[str, Literals], graphs: Sequence[fx.Graph], mode_reads: ModeReads
) -> LiteralOwners:
    """Return the owner of each literal that does not belong to the module in whose forward it stands, since that reads no mode.

    It belongs to a module around it, which reads its own mode and passes it on, or to the only module that reads one.
    """
    modules = modules_by_path(model)
    reading = {modules[path]: path for path in mode_reads.paths if path in modules}
    owners = LiteralOwners()
    for node in (node for graph in graphs for node in graph.nodes if name_of(node) in literals):
        path = scope_of(node)
        while path and modules.get(path) not in reading:
            path = path.rpartition(".")[0]
        if modules.get(path) not in reading and len(reading) == 1:
            (path,) = reading.values()
        if path != scope_of(node) and modules.get(path) in reading:
            owners |= {(name_of(node), i): path for i in literals[name_of(node)]}
    return owners


def _mode_dependence(
    model: nn.Module, trace: Callable[[], fx.Graph], readers: Mapping[str, str], train: fx.Graph, evaluation: fx.Graph
) -> tuple[LiteralOwners, list[str]]:
    """Find out what in the graphs depends on modes that another module reads (``self.drop.training``).

    Returns:
        A pair. First, for each literal that the mode of one submodule decides, the path of that submodule. Second, the paths of the
        submodules whose modes the graph must assert, because the graph's structure depends on the mode, too, or because it could not be
        found out what depends on the mode.
    """
    owners, asserted = LiteralOwners(), list[str]()
    modes = {module: module.training for module in model.modules()}
    for paths in [[path] for path in readers] if len(readers) <= _MAX_ONE_BY_ONE else [list(readers)]:
        # each mode once more, with only these submodules in the other one
        try:
            alone = set(map(model.get_submodule, paths))
            others = modes.keys() - alone
            turned = compared(train, _in_mode(modes, others.__contains__, trace))
            back = compared(evaluation, _in_mode(modes, alone.__contains__, trace))
        except Exception as error:  # with these submodules in the other mode, the forward takes a branch that cannot be traced
            raise_interrupt(error)
            asserted += paths
            continue
        if turned == back == (True, {}):
            continue

        # ``back`` compares in the other direction, so its pairs are (eval, train)
        swapped = {name: {i: (b, a) for i, (a, b) in literals.items()} for name, literals in back[1].items()}
        # both modes agree on which literals this one submodule decides, and on nothing else
        if len(paths) == 1 and turned[0] and back[0] and turned[1] == swapped:
            owners |= {(name, i): paths[0] for name, literals in swapped.items() for i in literals}
        else:
            asserted += paths
    return owners, asserted


def trace_both_modes(
    model: nn.Module, trace: Callable[[], fx.Graph], opaque: dict[str, str], mode_reads: ModeReads, run: bool,
    earlier: Snapshot | None = None, follow: Follow = _never, failed: list[Exception] | None = None,
) -> ModeGraphs:  # fmt: skip
    """Trace both modes, again and again until no further submodule becomes opaque. So a module is opaque in both modes or in neither.

    Args:
        model: The model.
        trace: Traces the model in its present mode, and may add to ``opaque`` and ``mode_reads``.
        opaque: The opaque modules by path, with reasons.
        mode_reads: Filled by ``trace`` with the modes that the forward reads.
        run: Whether opaque modules run during a trace.
        earlier: A snapshot of the model, since which nothing has changed.
        follow: As in ``trace_each_mode``.
        failed: Filled with the error of a trace in eval mode that fails, whereupon eval mode is left out. Without it, the error is raised.
    """

    def left_out(error: Exception) -> bool:
        if failed is None or (isinstance(error, StatefulForward) and makes_opaque(error, opaque)):
            return False
        failed.append(error)
        return True

    def repeatable() -> fx.Graph:
        return trace_repeatable(model, trace, opaque, mode_reads, run, earlier)

    while True:
        before = len(opaque)
        mode_reads.readers.clear()
        if failed:
            failed.clear()
        graphs = or_make_opaque(lambda: trace_each_mode(model, repeatable, mode_reads, follow, left_out), opaque)
        if graphs is not None and len(opaque) == before:
            return graphs


def _in_mode(modes: Mapping[nn.Module, bool], mode: Callable[[nn.Module], bool], trace: Callable[[], _T]) -> _T:
    """Trace with each module in the mode that ``mode`` returns for it, and restore the modes in ``modes`` afterwards."""
    with modes_set(modes, mode):
        return trace()


@contextmanager
def modes_set(modes: Mapping[nn.Module, bool], mode: Callable[[nn.Module], bool]) -> Iterator[None]:
    """Within the block, each module in ``modes`` has the mode that ``mode`` returns for it; afterwards, the one in ``modes``.

    ``train()`` is not called, because a user's override may do more.
    """

    def back() -> None:
        for module, training in modes.items():
            module.training = training

    with Changes() as changes, changes:
        changes.later(back)
        for module in modes:
            module.training = mode(module)
        yield


def standing_in(train: fx.Graph, why: str) -> fx.Graph:
    """Return a graph for eval mode that takes the inputs of a graph and raises TraceError with a message."""
    graph = fx.Graph()
    for node in train.find_nodes(op="placeholder"):
        graph.node_copy(node)
    raised = graph.call_function(not_in_eval, (why,))
    label_site(raised, "")
    graph.output(raised)
    return graph


def _assert_modes(graph: fx.Graph, expected: Mapping[str, bool | str]) -> None:
    """Make the graph assert the modes of submodules.

    Args:
        graph: The graph.
        expected: A dict. Each key is the path of a submodule; the value says what its ``training`` must equal. A bool is a fixed mode; a
            string is the path of another ``training`` attribute.
    """
    if not expected:
        return
    first = next((node for node in graph.nodes if node.op != "placeholder"), graph.output_node())
    with graph.inserting_before(first):
        wanted = [graph.create_node("get_attr", mode) if isinstance(mode, str) else mode for mode in expected.values()]
        reads = [graph.create_node("get_attr", _training_path(path)) for path in expected]
        asked = graph.call_function(modes_asked, (tuple(reads), tuple(wanted), tuple(expected)))
    for node in (*reads, *(each for each in wanted if isinstance(each, fx.Node)), asked):
        label_site(node, "")


def _training_path(path: str) -> str:
    """Return the path of a module's ``training`` attribute."""
    return f"{path}.training" if path else "training"


def _read_modes(graph: fx.Graph, differing: Mapping[str, Literals], owners: LiteralOwners) -> None:
    """Replace each literal that depends on the mode: by a read of a module's ``training``, or by a choice that this read decides.

    That module is the one that ``owners`` has for the literal. If ``owners`` has none, it is the module in whose forward the node was made.
    """
    for node in list(graph.nodes):
        literals = differing.get(name_of(node))
        if not literals:
            continue
        home, name = scope_of(node), name_of(node)
        reads = dict[int, fx.Node]()
        with graph.inserting_before(node):
            for i, (a, b) in literals.items():
                training = graph.create_node("get_attr", _training_path(owners.get((name, i), home)))
                # ``training=self.training`` becomes the read itself; other literals, a choice
                plain = (a, b) == (True, False) and type(a) is type(b) is bool
                reads[i] = training if plain else graph.call_function(choose, (training, a, b))
        # ``map_aggregate`` meets the arguments in the order in which ``flat`` has numbered them
        position = iter(range(len(flat(node))))

        def replaced(leaf: Any, reads: Mapping[int, fx.Node] = reads, position: Iterator[int] = position) -> Any:
            return reads.get(next(position), leaf)

        node.args, node.kwargs = map_aggregate((node.args, node.kwargs), replaced)
