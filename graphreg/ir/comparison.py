"""Compares two graphs of one model node by node: whether they have the same structure, and which literals differ."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate

from graphreg.ir.metadata import own_labels, scope_of
from graphreg.ir.train_eval import ModeGraphs

# position in the result of ``flat`` -> (literal in the first graph, literal in the second)
Literals = dict[int, tuple[Any, Any]]


def name_of(node: fx.Node) -> str:
    """Return the name of a node's site; for a node that is no site, a colon and the node's name."""
    labels = own_labels(node)
    return str(labels[0].name) if labels else f":{node.name}"  # no label begins with a colon


def flat(node: fx.Node) -> list[Any]:
    """Return a node's arguments as a flat list. Corresponding arguments of two calls with the same structure have the same position."""
    flat: list[Any] = []
    map_aggregate((node.args, node.kwargs), flat.append)
    return flat


def literals_between(a: fx.Node, b: fx.Node) -> tuple[Literals, bool] | None:
    """Return the literals that differ between two nodes, and whether the nodes read the same values.

    Return None unless both are the same operation with the same structure of arguments. If the
    nodes read different values, for example because an operation before them depends on the mode,
    return only the literals of type bool, such as ``training=``.
    """
    if a.op != b.op or a.target != b.target or a.kwargs.keys() != b.kwargs.keys():
        return None
    return literals_apart(flat(a), flat(b))


def literals_apart(ours: list[Any], theirs: list[Any]) -> tuple[Literals, bool] | None:
    """Return the same as ``literals_between``, for the flat lists of the arguments of two nodes that call the same operation."""
    if len(ours) != len(theirs):
        return None
    differing, same = Literals(), True
    for i, (x, y) in enumerate(zip(ours, theirs, strict=True)):
        if isinstance(x, fx.Node) != isinstance(y, fx.Node):
            return None
        if isinstance(x, fx.Node):
            same = same and name_of(x) == name_of(y)
        elif type(x) is not type(y) or not (x == y or (is_nan(x) and is_nan(y))):
            differing[i] = x, y
    return (differing if same else {i: pair for i, pair in differing.items() if type(pair[0]) is type(pair[1]) is bool}), same


def compared(first: fx.Graph, second: fx.Graph) -> tuple[bool, dict[str, Literals]]:
    """Return whether two graphs have the same structure, and a dict of the literals that differ, by name of the node that takes them."""
    others = {name_of(node): node for node in second.nodes}
    differing = {(name := name_of(node)): literals_between(node, others[name]) if name in others else None for node in first.nodes}
    # fewer names than nodes: two nodes have one name, and nothing tells which of them is which
    same = list(differing) == list(others) and len(differing) == len(first.nodes) == len(second.nodes)
    same = same and all(each is not None and each[1] for each in differing.values())
    return same, {name: each[0] for name, each in differing.items() if each is not None and each[0]}


def is_nan(value: Any) -> bool:
    """Return whether a value is a number that is nan."""
    return isinstance(value, (float, complex)) and value != value  # noqa: PLR0124  # nan is not equal to itself


def graph_difference(first: fx.Graph, second: fx.Graph) -> tuple[str, str] | None:
    """Return the first difference of two graphs: the path of the module in whose forward it is, and a sentence that describes it.

    Return None if the graphs are equal.
    """
    same, literals = compared(first, second)
    if same and not literals:
        return None
    others = {name_of(node): node for node in second.nodes}
    for node in first.nodes:
        name = name_of(node)
        path, shown_name = scope_of(node), name.removeprefix(":")
        if name in literals:
            was, now = next(iter(literals[name].values()))
            return path, f"{shown_name} takes {was!r} and then {now!r}"
        if name not in others or literals_between(node, others[name]) is None:
            return path, f"{shown_name} is another operation in the second trace"
    return "", "the second trace has other operations"


def digest(graphs: ModeGraphs, constants: Mapping[str, Tensor]) -> str:
    """Return a digest of the graphs of a model and of the constants that they read. Within a process, equal digests mean equal graphs."""
    made = hashlib.blake2b(digest_size=16)
    for mode, graph in graphs.items():
        names = {node: name_of(node) for node in graph.nodes}
        made.update(mode.encode())
        for node in graph.nodes:
            made.update(described_node(node, names).encode())
    for name, value in sorted(constants.items()):
        made.update(f"{name} {value.dtype} {tuple(value.shape)} {value.device} {_content(value)}".encode())
    return made.hexdigest()


def described_node(node: fx.Node, names: Mapping[fx.Node, str]) -> str:
    """Return a text for a node that says its name, operation and arguments. ``names``: the names of all nodes."""
    # two functions may have one name, as those that a decorator makes
    target = node.target if isinstance(node.target, str) else f"{node.target} {id(node.target)}"

    def described(leaf: Any) -> str:
        return f"%{names[leaf]}" if isinstance(leaf, fx.Node) else f"{type(leaf).__name__} {leaf!r}"

    return f"{names[node]}: {node.op} {target}{map_aggregate((node.args, node.kwargs), described)}\n"


def _content(value: Tensor) -> str:
    if value.device.type == "meta":
        return ""
    with torch.no_grad():
        return hashlib.blake2b(repr(value.detach().cpu().tolist()).encode()).hexdigest()
