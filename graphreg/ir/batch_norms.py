"""Finds the values that every reader takes into a batch norm: at such a value, dropout and noise shift the variance that the norm keeps.

Li et al., Understanding the disharmony between dropout and batch normalization by variance shift,
CVPR 2019: the norm's running variance is that of train mode, and eval mode has another.
"""

from __future__ import annotations

from collections.abc import Collection
from enum import IntEnum

from torch import fx, nn

from graphreg.ir.operations import Operations, function_name, is_in_place

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
# They put values side by side; a batch norm takes each channel by itself.
_JOINS = {"cat", "concat", "concatenate", "stack"}


class _Way(IntEnum):
    """How far a value has come on its way to a batch norm: only one run of layers with weights may lie on the way."""

    BEFORE = 0
    WITHIN = 1
    BEHIND = 2


def batch_norms_fed(
    graph: fx.Graph, operations: Operations, signals: Collection[fx.Node], products: Collection[fx.Node]
) -> dict[fx.Node, str]:
    """Return the nodes whose values every reader takes into a batch norm, each with the name of the first such norm.

    On the way lie views, functions of this one value such as a ReLU, ``cat``, and layers with
    weights: one, or several without anything but views between them. What combines the value with
    another, such as a sum, takes it elsewhere.

    Args:
        graph: A traced graph.
        operations: The operations of the graph's model.
        signals: The nodes that depend on a floating-point input or on a product.
        products: The nodes that multiply data by weights.
    """
    if not any(_keeps_variance(node, operations) for node in graph.nodes):
        return {}
    # By node, then by way: the batch norm into which all readers take the value from there.
    norms = dict[fx.Node, tuple[str, ...]]()

    def taken(node: fx.Node, reader: fx.Node, way: _Way) -> str:
        if _keeps_variance(reader, operations):
            return str(reader.target) if reader.op == "call_module" else reader.name
        together = function_name(reader) in _JOINS or [each for each in reader.all_input_nodes if each in signals] == [node]
        if reader.op == "output" or operations.is_norm(reader) or operations.is_opaque(reader) or not together:
            return ""
        if reader in products:
            return "" if way == _Way.BEHIND else norms[reader][_Way.WITHIN]
        passed = _Way.BEHIND if way == _Way.WITHIN and not operations.passes_through(reader) else way
        return norms[reader][passed]

    for node in reversed(graph.nodes):
        # what nobody reads and what writes nothing, such as an assertion about the value, takes it nowhere
        readers = [
            reader for reader in node.users if reader.op == "output" or (reader in signals and (reader.users or is_in_place(reader)))
        ]
        found = [[taken(node, reader, way) for reader in readers] for way in _Way]
        norms[node] = tuple(names[0] if names and all(names) else "" for names in found)
    return {node: by_way[_Way.BEFORE] for node, by_way in norms.items() if node in signals and by_way[_Way.BEFORE]}


def _keeps_variance(node: fx.Node, operations: Operations) -> bool:
    """Return whether a node is a batch norm that keeps a running variance for eval mode."""
    if (module := operations.module(node)) is not None:
        return isinstance(module, BATCH_NORMS) and module.running_var is not None
    # F.batch_norm(input, running_mean, running_var, ...)
    given = node.args[2] if len(node.args) > 2 else node.kwargs.get("running_var")
    return function_name(node) == "batch_norm" and given is not None
