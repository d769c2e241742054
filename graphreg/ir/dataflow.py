"""Which nodes a value reaches, or comes from: walks along a graph."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable

from torch import fx

from graphreg.ir.operations import function_name, is_integer, is_size


def sizes_of(graph: fx.Graph) -> set[fx.Node]:
    """The numbers, shapes and flags of a graph, which are no tensors."""
    sizes = set[fx.Node]()
    for node in graph.nodes:
        if is_size(node, sizes.__contains__):
            sizes.add(node)
    return sizes


def carries_derivative(node: fx.Node, sizes: Container[fx.Node]) -> bool:
    """Whether a derivative can pass through a node: it gives a tensor of real numbers that autograd records."""
    return node not in sizes and not is_integer(node) and function_name(node) != "detach"


def reached(
    start: Iterable[fx.Node], onward: Callable[[fx.Node], Iterable[fx.Node]], passes: Callable[[fx.Node], bool] = lambda node: True
) -> set[fx.Node]:
    """All nodes that a walk comes to, those it starts at among them. ``onward``: where it goes from one; ``passes``: which it enters."""
    visited, waiting = set[fx.Node](), list(start)
    while waiting:
        node = waiting.pop()
        if node not in visited and passes(node):
            visited.add(node)
            waiting += onward(node)
    return visited
