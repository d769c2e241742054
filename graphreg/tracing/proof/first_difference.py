"""Finds the first node of a graph whose value differs from the model's. The errors of the proof and of ``verify`` name this node.

The model and the graph are run once more, and the result of each torch operation is recorded, with
the path of the module or the name of the node that ran it. Operations of the two runs are matched
by their results, so the search usually succeeds even if one run has operations that the other does
not have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from graphreg.ir.containers import plain_containers
from graphreg.ir.metadata import is_added, own_name
from graphreg.ir.source_location import origin_of, short
from graphreg.torch_internals import pytree
from graphreg.torch_internals.torch_modes import TorchDispatchMode
from graphreg.tracing.proof.values import difference


@dataclass(frozen=True)
class Step:
    """One torch operation that ran.

    Attributes:
        operation: The name of the operation.
        values: Copies of the operation's results, made directly after it ran.
        memory: The results themselves; later operations may have written into them.
        by: The path of the module, or the name of the node, that ran the operation.
    """

    operation: str
    values: tuple[Tensor, ...]
    memory: tuple[Tensor, ...]
    by: str

    def same(self, other: Step, near: bool) -> bool:
        return self.operation == other.operation and _same(self.values, other.values, near)


def _same(ones: Sequence[Tensor], others: Sequence[Tensor], near: bool) -> bool:
    return len(ones) == len(others) and not any(difference(a, b, near) for a, b in zip(ones, others, strict=True))


class _Trail(TorchDispatchMode):
    """Records each torch operation that returns tensors. ``by`` returns the path of the module, or the name of the node, that runs."""

    def __init__(self, by: Callable[[], str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.by = by
        self.steps: list[Step] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        value = func(*args, **(kwargs or {}))
        results = tuple(leaf.detach() for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor))
        if results and "empty" not in str(func):  # what ``empty`` returns has no values yet
            self.steps.append(Step(str(func), tuple(leaf.clone() for leaf in results), results, self.by()))
        return value


def steps_of_model(model: nn.Module, call: tuple[tuple[Any, ...], dict[str, Any]]) -> list[Step]:
    """Call a copy of the model and return the operations that ran."""
    with _running(model) as running:
        trail = _Trail(lambda: running[-1])
        with trail:
            model(*call[0], **call[1])
    return trail.steps


@contextmanager
def _running(model: nn.Module) -> Iterator[list[str]]:
    """Keep a list of the paths of the modules that are running, the innermost last."""
    paths, handles = [""], []
    for path, module in model.named_modules():
        # ``and None``: what a forward hook returns would replace the output of the module
        handles += [
            module.register_forward_pre_hook(lambda m, args, path=path: paths.append(path)),
            module.register_forward_hook(lambda m, args, value: paths.pop() and None, always_call=True),
        ]
    try:
        yield paths
    finally:
        for handle in handles:
            handle.remove()


class GraphRun(fx.Interpreter):
    """Runs a graph on the modules and tensors of ``root``, and remembers the name of the node that is running."""

    def __init__(self, root: nn.Module, graph: fx.Graph) -> None:
        super().__init__(root, graph=graph)
        self.now = ""

    def on(self, inputs: Sequence[Any]) -> Any:
        """Run the graph on the values of its placeholders, and return its output."""
        return self.run(*inputs, enable_io_processing=False)

    def run_node(self, n: fx.Node) -> Any:
        self.now = n.name
        return super().run_node(n)

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> tuple[Any, Any]:
        """Return the arguments of a node. torch.fx writes lists and dicts of a graph as plain ones, and has immutable ones in the graph."""
        args, kwargs = super().fetch_args_kwargs_from_env(n)
        return tuple(map(plain_containers, args)), {name: plain_containers(value) for name, value in kwargs.items()}

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Any:
        # fx.Interpreter would give a placeholder ``*args`` all remaining inputs
        return next(self.args_iter)


def steps_of_graph(root: nn.Module, graph: fx.Graph, inputs: Sequence[Any]) -> list[Step]:
    """Run a graph on the values of its placeholders. Return the operations that ran, except those of nodes that graphreg added."""
    run = GraphRun(root, graph)
    trail = _Trail(lambda: run.now)
    with trail:
        run.on(inputs)
    added = {n.name for n in graph.nodes if is_added(n)}
    return [step for step in trail.steps if step.by not in added]


def culprit(theirs: Sequence[Step], ours: Sequence[Step], graph: fx.Graph, near: bool) -> str:
    """Return a sentence that names the first node whose value differs; if none differs, the first operation that only the model runs.

    The result is ``""`` if neither exists, or if the operation that differs belongs to no node of
    ``graph``.

    Args:
        theirs: The operations that the model ran.
        ours: The operations that the rewritten graph ran.
        graph: The graph with the nodes to name.
        near: Whether to allow a difference of ``NEAR`` (``values.py``).
    """
    nodes = {n.name: n for n in graph.nodes}
    pairs, missed = _matched(ours, theirs, near)
    if missed is not None:
        return f" The first node whose value differs is {_described(nodes[missed.by])}." if missed.by in nodes else ""

    # Each operation of the graph gave what the model's gave. Later writes may have changed either.
    for mine, other in pairs:
        if mine.by in nodes and not _same(mine.memory, other.memory, near):
            how = "the model writes into it later, and the graph does not"
            if not _same(mine.values, mine.memory, near):
                how = "the graph writes into it later, which the model does not do in the same way"
            return f" The first node whose value differs is {_described(nodes[mine.by])}: {how}."

    # the graph is right as far as it goes, and the model does more
    missed = _matched(theirs, ours, near)[1]
    if missed is None:
        return ""
    where = f"in {missed.by!r}" if missed.by else "in its own forward"
    return f" No node's value differs, but the model runs {missed.operation} {where}, and no node computes its result."


def _matched(steps: Sequence[Step], others: Sequence[Step], near: bool) -> tuple[list[tuple[Step, Step]], Step | None]:
    """Pair each of ``steps``, in order, with the next equal step in ``others``. Stop at the first step without an equal step.

    Returns:
        The pairs, and the step at which the pairing stopped, or None if all steps were paired.
    """
    position, pairs = 0, list[tuple[Step, Step]]()
    for step in steps:
        # behind the last match, because both run in the same order
        match = next((i for i in range(position, len(others)) if others[i].same(step, near)), None)
        if match is None:
            return pairs, step
        pairs.append((step, others[match]))
        position = match + 1
    return pairs, None


def _described(node: fx.Node) -> str:
    name, origin = own_name(node), origin_of(node)
    site = f", the site {name!r}" if name not in ("", node.name) else ""
    return f"{node.name!r}{site}{f' ({short(origin)})' if origin else ''}"
