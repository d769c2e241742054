"""The dependence slice of a penalty on derivatives: the nodes that lead from the values of ``wrt`` to the penalty's sites."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import fx, nn

from graphreg.errors import NoMatchError, RegularizerError, listed
from graphreg.ir.dataflow import reached, without_derivative
from graphreg.ir.metadata import own_name
from graphreg.ir.operations import Operations, function_name
from graphreg.ir.roles import site_nodes
from graphreg.ir.selector import Selector, select
from graphreg.ir.site import Site
from graphreg.ir.views_and_writes import ViewsAndWrites
from graphreg.tracing.trace import Traced

_ATTENTION = {"scaled_dot_product_attention", "multi_head_attention_forward"}


@dataclass(frozen=True)
class DependenceSlice:
    """What is known of the dependence slice of one penalty.

    Attributes:
        wrt: The sites whose values the penalty differentiates with respect to.
        apart: The names of the penalty's sites that depend on no value of ``wrt``; the derivatives
            of these sites are 0.
        suspects: The names of operations in the slice that torch may not be able to differentiate
            twice.
        attends: Whether an operation in the slice is attention, or may contain attention. Fused
            attention has no second derivative.
    """

    wrt: tuple[Site, ...]
    apart: tuple[str, ...]
    suspects: tuple[str, ...]
    attends: bool

    def note(self) -> str:
        """Return a description of the slice, for a line of the report."""
        text = f"with respect to {', '.join(site.name for site in self.wrt)}"
        return text + (f"; 0 at {', '.join(self.apart)}, because no path leads there" if self.apart else "")


def dependence_slice(traced: Traced, wrt: Selector, sites: Sequence[Site], who: str) -> DependenceSlice:
    """Find the dependence slice from the values that the selector ``wrt`` matches to ``sites``.

    Args:
        traced: The traced model.
        wrt: The selector; a lone ``*`` means the floating-point inputs.
        sites: The sites where the penalty acts.
        who: The penalty's class name, for errors.

    Raises:
        NoMatchError: ``wrt`` matches nothing.
        RegularizerError: No site depends on a value of ``wrt``.
    """
    inputs = [site for site in traced.values if site.role == "input" and site.selectable]
    usual = "the floating-point inputs"
    try:
        chosen = select(wrt, traced.values, inputs, model=traced.title, who=f"wrt of {who}", usual=usual, elsewhere=traced.parameters)
    except NoMatchError as error:
        raise NoMatchError(str(error) if "wrt of" in str(error) else f"wrt of {who}: {error}") from None
    wrt_sites = tuple(chosen)
    if not wrt_sites:
        raise NoMatchError(f"wrt={wrt!r} of {who} selects nothing. A lone '*' means {usual}.")
    apart, between = {site.name for site in sites}, dict[str, fx.Node]()
    for graph in traced.graphs.values():
        nodes = site_nodes(graph, traced.operations)
        after = downstream([nodes[s.name] for s in wrt_sites if s.name in nodes], traced.operations)
        before = upstream([nodes[s.name] for s in sites if s.name in nodes])
        # A site depends on ``wrt`` if it does so in the graph of one mode.
        apart -= {s.name for s in sites if nodes.get(s.name) in after}
        between |= {own_name(node) or node.name: node for node in graph.nodes if node in after and node in before}
    if traced.whole and sites and len(apart) == len(sites):
        raise RegularizerError(
            f"{who}: no derivative with respect to {listed([site.name for site in wrt_sites])} reaches its sites "
            f"({listed(sorted(apart))}), so the penalty would change nothing. Select other sites, or other values with wrt=."
        )

    suspects = list[str]()
    for name, node in between.items():
        module = traced.operations.module(node)
        is_loss = isinstance(module, nn.CTCLoss) or function_name(node) == "ctc_loss"
        if is_loss or isinstance(module, nn.RNNBase) or _may_attend(node, traced.operations):
            suspects.append(name)
    attends = any(_may_attend(node, traced.operations) for node in between.values())
    return DependenceSlice(wrt_sites, tuple(s.name for s in sites if s.name in apart), tuple(suspects), attends)


def downstream(nodes: Sequence[fx.Node], operations: Operations) -> set[fx.Node]:
    """Return ``nodes`` and all nodes that depend on one of them through floating-point values, also through in-place writes."""
    effects, stopped = ViewsAndWrites(operations), without_derivative(nodes[0].graph) if nodes else set()
    return reached(nodes, lambda node: [*node.users, *effects.writes(node)], lambda node: node not in stopped)


def upstream(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """Return ``nodes`` and all nodes that one of them depends on."""
    return reached(nodes, lambda node: node.all_input_nodes)


def _may_attend(node: fx.Node, operations: Operations) -> bool:
    module = operations.module(node)
    # It is not known what an opaque module computes.
    return isinstance(module, nn.MultiheadAttention) or function_name(node) in _ATTENTION or operations.is_opaque(node)
