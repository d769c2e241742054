"""Finds out whether an exported graph, which torch.export makes for sizes from 2 on, holds for a batch of one."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg

from graphreg.errors import GraphRegError
from graphreg.ir.comparison import compared
from graphreg.tracing.export.conditions import DECIDES_ON_BATCH
from graphreg.tracing.export.unlift import Unlifter
from graphreg.tracing.side_effects.retrace import same_graph


class BatchOfOne:
    """Handles the conditions on sizes that the forward asks about and that have another answer for a batch of one.

    Models of the library transformers compare the size of the batch with that of an axis of size 1,
    and call ``expand`` if the two differ. With a batch of one, ``expand`` would change nothing. So
    the graph holds for a batch of one if a trace with the opposite answers gives the same graph,
    except for such calls of ``expand``.
    """

    def __init__(self, wide: bool) -> None:
        """Prepare. ``wide``: whether the example is a batch of one that was widened to two."""
        self.wide = wide
        # (graph, texts of conditions, whether the graph holds)
        self._known: list[tuple[fx.Graph, Collection[str], bool]] = []

    def settle(self, made: Unlifter, again: Callable[[Collection[str]], Unlifter]) -> None:
        """Make the graph assert the conditions that are false for a batch of one, unless the graph holds for a batch of one all the same.

        Args:
            made: The ``Unlifter`` that made the graph.
            again: Traces the same mode again, and negates the answers to the conditions with the
                given texts.

        Raises:
            GraphRegError: The graph does not hold for a batch of one, and the example is a batch of
                one.
        """
        conditions = made.inputs.conditions if made.inputs is not None else None
        if made.inputs is None or conditions is None or not (asked := conditions.fail_for_one):
            return
        known = (holds for graph, texts, holds in self._known if texts == asked.keys() and compared(graph, made.graph)[0])
        holds = next(known, None)  # the graph of the other mode often is the same
        if holds is None:
            holds = same_graph(_without(made.graph, made.idle), lambda: _without((other := again(asked)).graph, other.idle))
            self._known.append((made.graph, asked.keys(), holds))
        if holds:
            return
        if self.wide:
            raise GraphRegError(DECIDES_ON_BATCH)
        made.inputs.assert_more(asked.values())


def _without(graph: fx.Graph, idle: Collection[fx.Node]) -> fx.Graph:
    """Copy a graph without the operations in ``idle``, which their first arguments replace, and without sizes that only these read."""
    left_out = set(idle)
    for node in reversed(graph.nodes):
        if node.target is torch.ops.aten.sym_size.int and left_out.issuperset(node.users):
            left_out.add(node)
    copied, made = fx.Graph(), dict[Any, Any]()
    for node in graph.nodes:
        if node in idle:
            made[node] = made[node.args[0]]
        elif node not in left_out:
            args, kwargs = map_arg((node.args, node.kwargs), made.__getitem__)
            made[node] = copied.create_node(node.op, node.target, args, kwargs)
    return copied
