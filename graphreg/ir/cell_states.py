"""Finds, for a state that a call of a recurrent cell returns, the previous state: the one that the call got as an argument."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from graphreg.ir.operations import Operations, is_port


def cell_call(node: fx.Node, operations: Operations) -> fx.Node | None:
    """Return the call of a torch recurrent cell that returned a node's value, alone or in a tuple; None if no such call did."""
    source: Any = node.args[0] if is_port(node, operations) else node
    return source if isinstance(source, fx.Node) and isinstance(operations.module(source), nn.RNNCellBase) else None


def state_before(node: fx.Node, operations: Operations) -> fx.Node | None:
    """Return the state that a cell got as an argument when it returned the state at ``node``; None if the call starts from zeros.

    Raises:
        LookupError: The two states of an LSTM cell were passed as one object, and the graph does
            not show them separately.
    """
    call = cell_call(node, operations)
    assert call is not None
    given = call.args[1] if len(call.args) > 1 else call.kwargs.get("hx")
    if node is not call and given is not None:
        if not isinstance(given, (tuple, list)):
            raise LookupError(f"{call.name} got both of its states as one object")
        given = given[node.args[1]]  # type: ignore[index]
    return given if isinstance(given, fx.Node) else None
