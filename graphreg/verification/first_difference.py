"""The culprit: the first node of a rewritten graph that computes what the model does not, by the operations that both run.

Both are run once more, and what every operation of torch gives is written down: of the model with the module that was running, of
the graph with the node. A node is found out by its value, so that it matters little what stands between.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from graphreg.ir import held_of, is_added, origin_of, own_name, short
from graphreg.runtime import graphs_of
from graphreg.torch_internals import TorchDispatchMode, pytree
from graphreg.tracing import Arguments
from graphreg.verification.values import difference


@dataclass(frozen=True)
class Step:
    """One operation: its name, what it gave, and by whom it was run: the path of a module, or the name of a node.

    ``values`` as they were then, ``memory`` as later operations have left them.
    """

    operation: str
    values: tuple[Tensor, ...]
    memory: tuple[Tensor, ...]
    by: str

    def same(self, other: Step, near: bool) -> bool:
        return self.operation == other.operation and _same(self.values, other.values, near)


def _same(ones: Sequence[Tensor], others: Sequence[Tensor], near: bool) -> bool:
    return len(ones) == len(others) and not any(difference(a, b, near) for a, b in zip(ones, others, strict=True))


class _Trail(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Writes down what each operation gives. ``by``: who runs it."""

    def __init__(self, by: Callable[[], str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.by = by
        self.steps: list[Step] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        value = func(*args, **(kwargs or {}))
        found = tuple(leaf.detach() for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor))
        if found:
            self.steps.append(Step(str(func), tuple(leaf.clone() for leaf in found), found, self.by()))
        return value


def steps_of_model(model: nn.Module, call: Arguments) -> list[Step]:
    """The operations of a call of a copy of the model."""
    with _running(model) as running:
        trail = _Trail(lambda: running[-1])
        with trail:
            model(*call[0], **call[1])
    return trail.steps


@contextmanager
def _running(model: nn.Module) -> Iterator[list[str]]:
    """The paths of the modules that are running, the innermost last."""
    paths, handles = [""], []
    for path, module in model.named_modules():
        handles += [
            module.register_forward_pre_hook(lambda m, args, path=path: paths.append(path)),
            module.register_forward_hook(lambda m, args, value: paths.pop() and None, always_call=True),
        ]
    try:
        yield paths
    finally:
        for handle in handles:
            handle.remove()


class _Walk(fx.Interpreter):
    """Runs a graph, and knows the node that runs."""

    now = ""

    def run_node(self, n: fx.Node) -> Any:
        self.now = n.name
        return super().run_node(n)

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Any:
        return next(self.args_iter)  # torch.fx would make a list of what is left for ``*args``


def steps_of_graph(module: fx.GraphModule, graph: fx.Graph, call: Arguments) -> list[Step]:
    """The operations of the model's own nodes, in a call of a copy of the rewritten module."""
    bound = inspect.signature(module.forward).bind(*call[0], **call[1])
    bound.apply_defaults()
    known = {**held_of(module), **bound.arguments}
    given = [known[str(n.target).lstrip("*")] for n in graph.nodes if n.op == "placeholder"]
    walk = _Walk(module, graph=graph)
    trail = _Trail(lambda: walk.now)
    with trail:
        walk.run(*given, enable_io_processing=False)
    added = {n.name for n in graph.nodes if is_added(n)}
    return [step for step in trail.steps if step.by not in added]


def graph_of(module: fx.GraphModule, mode: str) -> fx.Graph:
    graphs = graphs_of(module)
    return graphs.get("both") or graphs[mode]


def culprit(theirs: Sequence[Step], ours: Sequence[Step], graph: fx.Graph, near: bool) -> str:
    """The first node whose value differs, as a sentence; else the first operation of the model's that the graph has not."""
    nodes = {n.name: n for n in graph.nodes}
    pairs, missed = _matched(ours, theirs, near)
    if missed is not None:
        return f" The first node whose value differs is {_told(nodes[missed.by])}." if missed.by in nodes else ""
    for mine, other in pairs:
        if mine.by in nodes and not _same(mine.memory, other.memory, near):
            where = "in the model alone" if _same(mine.values, mine.memory, near) else "in the graph, and not so in the model"
            return f" The first node whose value differs is {_told(nodes[mine.by])}: something writes into it later {where}."
    missed = _matched(theirs, ours, near)[1]
    if missed is None:
        return ""
    where = f"in {missed.by!r}" if missed.by else "in its own forward"
    return f" No node's value differs, but the model runs {missed.operation} {where}, and no node has that value."


def _matched(steps: Sequence[Step], others: Sequence[Step], near: bool) -> tuple[list[tuple[Step, Step]], Step | None]:
    """Each step with its like among what is left of the others, in their order, as far as there is one; the first that has none."""
    position, pairs = 0, list[tuple[Step, Step]]()
    for step in steps:
        found = next((i for i in range(position, len(others)) if others[i].same(step, near)), None)
        if found is None:
            return pairs, step
        pairs.append((step, others[found]))
        position = found + 1
    return pairs, None


def _told(node: fx.Node) -> str:
    name, origin = own_name(node), origin_of(node)
    site = f", the site {name!r}" if name not in ("", node.name) else ""
    return f"{node.name!r}{site}{f' ({short(origin)})' if origin else ''}"


def first_differing(
    theirs: nn.Module, ours: fx.GraphModule, calls: tuple[Arguments, Arguments], graphs: tuple[fx.Graph, fx.Graph],
    seed: Callable[[], None], near: bool,
) -> str:  # fmt: skip
    """``culprit`` of two copies that stand before the call that differs; nothing where it cannot be found out.

    ``graphs``: that of the copy, and the same with what the trace knows of its nodes.
    """
    try:
        seed()
        expected = steps_of_model(theirs, calls[0])
        seed()
        return culprit(expected, steps_of_graph(ours, graphs[0], calls[1]), graphs[1], near)
    except Exception:  # it is a help beside an error: what fails here must not take its place
        return ""
