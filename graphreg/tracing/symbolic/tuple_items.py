"""Handles ports, which are nodes that take an item out of a tuple. Each port is a value with its own names."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

from torch import fx, nn

from graphreg.ir.metadata import add_label, label_site, own_labels, scope_of
from graphreg.ir.operations import Operations, function_name, is_port, names_of_results
from graphreg.tracing.shape_decisions import in_parts


def settle_ports(graph: fx.Graph, operations: Operations) -> None:
    """Merge nodes that take the same item out of a tuple (``parts[0]`` twice) into one node with all of their labels.

    An item that is taken by name (``x.max(1).values``) is taken by number from then on.
    The two states of nn.LSTMCell and the output of a recurrent layer get a port even if the model
    passes the whole tuple on.
    """
    first: dict[tuple[Any, ...], fx.Node] = {}
    for node in graph.nodes:
        module = operations.module(node)
        if isinstance(module, (nn.LSTMCell, nn.RNNBase)):
            # backwards, because each port is put directly behind the node
            _take_out(graph, node, (1, 0) if isinstance(module, nn.LSTMCell) else (0,), operations)
        if node.target is getattr and isinstance(node.args[0], fx.Node) and operations.is_list(node.args[0]):
            names = names_of_results(function_name(node.args[0]))
            if node.args[1] in names:
                node.target, node.args = operator.getitem, (node.args[0], names.index(node.args[1]))
        if not is_port(node, operations):
            continue
        earlier = first.setdefault(node.args, node)
        if earlier is not node:
            for label in own_labels(node):
                add_label(earlier, label)
            node.replace_all_uses_with(earlier)
            graph.erase_node(node)


def assert_guesses(graph: fx.Graph, operations: Operations) -> None:
    """Make the graph assert that each value that was assumed to be a tuple is one."""
    for node in [node for node in graph.nodes if operations.guesses_list(node)]:
        with graph.inserting_after(node):
            assertion = graph.call_function(in_parts, (node, str(node.target) if node.op == "call_module" else node.name))
            label_site(assertion, scope_of(node))


def _take_out(graph: fx.Graph, node: fx.Node, ports: Sequence[int], operations: Operations) -> None:
    """For each index in ``ports``, add a node that takes this item out of a tuple, unless there is one."""
    there = {user.args[1] for user in node.users if is_port(user, operations)}
    for port in ports:
        if port not in there:
            with graph.inserting_after(node):
                label_site(graph.call_function(operator.getitem, (node, port)), str(node.target))
