"""Facts about a traced graph that both the lowering and the check of the result need, so that a rewrite finds them out once."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from graphreg.ir import Aliases, site_nodes
from graphreg.tracing import Traced


@dataclass(frozen=True)
class GraphFacts:
    """What follows from a traced graph alone, without any plan.

    Attributes:
        graph: The graph.
        aliases: Which values share storage, and which nodes write into it.
        where: The node of each site, by the site's name.
    """

    graph: fx.Graph
    aliases: Aliases
    where: dict[str, fx.Node]

    @classmethod
    def of(cls, graph: fx.Graph, traced: Traced) -> GraphFacts:
        """Analyse one of the graphs of a trace."""
        return cls(graph, Aliases(graph, traced.operations), site_nodes(graph, traced.operations))
