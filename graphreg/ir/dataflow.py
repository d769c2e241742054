"""Walks along a graph: which nodes depend on a value, and on which nodes a value depends."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import FunctionType

from torch import fx

from graphreg.ir.operations import function_name, is_integer, is_size
from graphreg.torch_internals.torch_modes import gradients_switched


def sizes_of(graph: fx.Graph) -> set[fx.Node]:
    """Return the nodes whose values are not tensors but numbers, shapes or flags."""
    sizes = set[fx.Node]()
    for node in graph.nodes:
        if is_size(node, sizes.__contains__):
            sizes.add(node)
    return sizes


def without_derivative(graph: fx.Graph) -> set[fx.Node]:
    """Return the nodes through which no derivative passes.

    They are numbers, shapes, flags, integer tensors, what is computed in a block of
    ``torch.no_grad``, detached tensors, and tensors that only have the options of another tensor,
    such as ``torch.zeros_like(x)``.
    """
    stopped, is_off = sizes_of(graph), False
    for node in graph.nodes:
        if node.target is gradients_switched:
            is_off = node.args[0] is False
        stops = is_integer(node) or function_name(node) in ("detach", "detach_") or has_options_only(node)
        if node.op != "get_attr" and (is_off or stops):
            stopped.add(node)
    return stopped


def has_options_only(node: fx.Node) -> bool:
    """Return whether a tensor has the shape and options of another one, and none of its values, such as ``torch.zeros_like(x)``."""
    name = function_name(node)
    is_users = isinstance(node.target, FunctionType)  # those of torch are built in
    return (name.endswith("_like") or name.startswith("new_") or name == "new") and not is_users


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
