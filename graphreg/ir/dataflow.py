"""Walks along a graph: which nodes depend on a value, and on which nodes a value depends."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable

from torch import fx

from graphreg.ir.operations import function_name, is_integer, is_size


def sizes_of(graph: fx.Graph) -> set[fx.Node]:
    """Return the nodes whose values are not tensors but numbers, shapes or flags."""
    sizes = set[fx.Node]()
    for node in graph.nodes:
        if is_size(node, sizes.__contains__):
            sizes.add(node)
    return sizes


def carries_derivative(node: fx.Node, sizes: Container[fx.Node]) -> bool:
    """Return whether a derivative can pass through a node. It cannot pass through numbers, integer tensors or ``detach``."""
    return node not in sizes and not is_integer(node) and function_name(node) != "detach"


def reached(
    start: Iterable[fx.Node], onward: Callable[[fx.Node], Iterable[fx.Node]], passes: Callable[[fx.Node], bool] = lambda node: True
) -> set[fx.Node]:
    """Return all nodes that a walk through a graph visits, including the starting nodes that ``passes`` admits.

    Args:
        start: The nodes to start at.
        onward: Returns, for a node, the nodes to which the walk goes on.
        passes: Returns whether the walk may enter a node; by default, it may enter every node.
    """
    visited, waiting = set[fx.Node](), list(start)
    while waiting:
        node = waiting.pop()
        if node not in visited and passes(node):
            visited.add(node)
            waiting += onward(node)
    return visited
