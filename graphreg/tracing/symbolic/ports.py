"""Ports: the parts that are taken out of a tuple, each a value of its own."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

from torch import fx, nn

from graphreg.ir import Operations, add_label, is_port, label_site, own_labels, scope_of
from graphreg.tracing.shape_decisions import in_parts


def settle_ports(graph: fx.Graph, operations: Operations) -> None:
    """A part that is taken out of a tuple twice (``parts[0]``, and again) is one value: one node, with both names.

    The two states of nn.LSTMCell and the output of a recurrent layer have their ports also where the tuple goes on as it is.
    """
    first: dict[tuple[Any, ...], fx.Node] = {}
    for node in graph.nodes:
        module = operations.module(node)
        if isinstance(module, (nn.LSTMCell, nn.RNNBase)):
            _take_out(graph, node, (1, 0) if isinstance(module, nn.LSTMCell) else (0,), operations)
        if not is_port(node, operations):
            continue
        kept = first.setdefault(node.args, node)
        if kept is not node:
            for label in own_labels(node):
                add_label(kept, label)
            node.replace_all_uses_with(kept)
            graph.erase_node(node)


def assert_guesses(graph: fx.Graph, operations: Operations) -> None:
    """Have the graph look whether what was taken for a tuple is one."""
    for node in [node for node in graph.nodes if operations.guesses_list(node)]:
        with graph.inserting_after(node):
            look = graph.call_function(in_parts, (node, str(node.target) if node.op == "call_module" else node.name))
            label_site(look, scope_of(node))


def _take_out(graph: fx.Graph, node: fx.Node, ports: Sequence[int], operations: Operations) -> None:
    there = {user.args[1] for user in node.users if is_port(user, operations)}
    for port in ports:
        if port not in there:
            with graph.inserting_after(node):
                label_site(graph.call_function(operator.getitem, (node, port)), str(node.target))
