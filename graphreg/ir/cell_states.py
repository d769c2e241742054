"""Finds the state that a call of a recurrent cell got, for the state that it returns."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from graphreg.ir.operations import Operations, is_port


def cell_call(node: fx.Node, operations: Operations) -> fx.Node | None:
    """Return the call of one of torch's cells whose output, or part of an output, a node is; None for any other node."""
    source: Any = node.args[0] if is_port(node, operations) else node
    return source if isinstance(source, fx.Node) and isinstance(operations.module(source), nn.RNNCellBase) else None


def state_before(node: fx.Node, operations: Operations) -> fx.Node | None:
    """Return the state that the call got in the place of the one that it returns at ``node``; None if it got none, which means zeros.

    Raises:
        LookupError: The states of an LSTM cell were passed as one object, of which the graph does not show the parts.
    """
    call = cell_call(node, operations)
    assert call is not None
    given = call.args[1] if len(call.args) > 1 else call.kwargs.get("hx")
    if node is not call and given is not None:
        if not isinstance(given, (tuple, list)):
            raise LookupError(f"{call.name} got both of its states as one object")
        given = given[node.args[1]]  # type: ignore[index]
    return given if isinstance(given, fx.Node) else None
