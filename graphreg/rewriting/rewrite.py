"""The rewrite: the plan is lowered to insertions, and each graph is copied with them in it, in one walk. It decides nothing itself.

Every node it adds says so in ``node.meta["graphreg"]``: its kind, its regularizer, its site.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_aggregate

from graphreg.errors import RegularizerError
from graphreg.ir import Addition, blank_like, mark
from graphreg.planning import Plan, require_sites
from graphreg.rewriting.insertions import Insertion, Insertions, Position
from graphreg.rewriting.instantiate import make_rules, runtime_module_names
from graphreg.rewriting.invariants import check
from graphreg.rewriting.plan_lowering import lower
from graphreg.runtime import (
    AttachRule,
    BuildRecord,
    Penalties,
    Regularized,
    RewrittenModule,
    Rules,
    Scale,
    check_penalties,
    check_scale,
)
from graphreg.torch_internals import collector_at_rest
from graphreg.tracing import Traced


@collector_at_rest()
def rewrite(
    traced: Traced, plan: Plan, rng: int | torch.Generator | None = None, penalties: Penalties = "return", scale: Scale | None = None
) -> RewrittenModule:
    """The module that the plan describes, checked; the traced model and its graphs stay as they are.

    ``rng``: an int, a torch.Generator (one draw), or None (one draw from torch's global generator).
    ``penalties``: ``"return"`` them with the output, or ``"attach"`` them to it; ``scale``: of the loss, for attaching.
    """
    check_penalties(penalties)
    check_scale(scale)
    if not isinstance(plan, Plan) or not isinstance(traced, Traced):
        raise RegularizerError("rewrite takes what graphreg.trace gives and what graphreg.plan gives, in this order.")
    require_sites(plan, traced)
    names = runtime_module_names(plan)
    rules = make_rules(traced.model, plan, names, rng)
    lowered = {mode: lower(graph, traced, plan, names, penalties) for mode, graph in traced.graphs.items()}
    _settle(rules, lowered.values())
    if penalties == "attach" and (attached := next(iter(lowered.values())).totals):
        rules.add_module("attach", AttachRule(tuple(attached), scale, next(iter(rules.strengths.values())).device))
    graphs = {mode: inserted(graph, lowered[mode]) for mode, graph in traced.graphs.items()}
    module = RewrittenModule(traced.model, graphs, rules, traced.specialized, traced.constants, traced.whole)
    rules.build_record = BuildRecord.of(traced, plan)
    rules.train(module.training)
    check(module, traced, plan)
    return module


def _settle(rules: Rules, lowered: Iterable[Insertions]) -> None:
    """Tell the runtime modules what the lowering found out about the values that they act on."""
    for insertions in lowered:
        facts = {"recomputed": insertions.recomputed, "overwritten": insertions.overwritten, "apart": insertions.apart}
        for fact, names in facts.items():
            for name in names:
                setattr(rules.get_submodule(name), fact, True)


def inserted(graph: fx.Graph, insertions: Insertions) -> fx.Graph:
    """A copy of a traced graph with the insertions in it, made in one walk over the graph's nodes.

    A node of the model's own reads what stands for a value at its place: the copy of the node that made the value, or the last
    insertion that replaces it.
    """
    copy, at = blank_like(graph), insertions.by_place
    made: dict[fx.Node | Insertion, fx.Node] = {}  # what each node and each insertion became
    present: dict[fx.Node, fx.Node] = {}  # what the model's own nodes read at this place of the walk
    chosen: dict[fx.Node, dict[fx.Node, fx.Node]] = {}  # by reader: what it alone reads

    def insert(places: Iterable[Insertion]) -> None:
        for insertion in places:
            made[insertion] = node = _insert(copy, insertion, made)
            if insertion.replaces is not None and insertion.readers is None:
                present[insertion.replaces] = node
            for reader in insertion.readers or ():
                chosen.setdefault(reader, {})[insertion.replaces] = node  # type: ignore[index]

    for node in graph.nodes:
        insert(at.get((Position.BEFORE, node), ()))
        read = {**present, **chosen[node]} if node in chosen else present
        if node.op == "output":
            _copy_output(copy, node, read, insertions, made)
            continue
        instead = at.get((Position.INSTEAD, node))
        twin = copy.node_copy(node, read.__getitem__) if instead is None else _copy_instead(copy, node, instead[0], read, made)
        made[node] = present[node] = twin
        insert(at.get((Position.AFTER, node), ()))
    return copy


def _insert(copy: fx.Graph, insertion: Insertion, made: dict[fx.Node | Insertion, fx.Node]) -> fx.Node:
    node = copy.create_node(insertion.op, insertion.target, *_linked(insertion, made), name=insertion.name)
    mark(node, _addition(insertion))
    return node


def _linked(insertion: Insertion, made: dict[fx.Node | Insertion, fx.Node]) -> tuple[Any, Any]:
    """The arguments of an insertion, with the nodes of the copy in them."""

    def link(leaf: Any) -> Any:
        return made[leaf] if isinstance(leaf, (fx.Node, Insertion)) else leaf

    return map_aggregate(insertion.args, link), map_aggregate(dict(insertion.kwargs), link)


def _copy_instead(
    copy: fx.Graph, node: fx.Node, insertion: Insertion, read: dict[fx.Node, fx.Node], made: dict[fx.Node | Insertion, fx.Node]
) -> fx.Node:
    """The node's copy, which calls what the insertion says: with its own arguments first."""
    twin = copy.node_copy(node, read.__getitem__)
    more, named = _linked(insertion, made)
    twin.op, twin.target, twin.args, twin.kwargs = insertion.op, insertion.target, (*twin.args, *more), {**twin.kwargs, **named}
    mark(twin, _addition(insertion, was=(node.op, node.target)))
    return twin


def _copy_output(
    copy: fx.Graph, node: fx.Node, read: dict[fx.Node, fx.Node], insertions: Insertions, made: dict[fx.Node | Insertion, fx.Node]
) -> None:
    value: Any = fx.node.map_arg(node.args[0], read.__getitem__)
    if insertions.returns:
        totals: dict[str, Any] = {name: made[total] for name, total in insertions.totals.items()}
        value = Regularized(value, totals)
    copy.output(value).meta.update(node.meta)


def _addition(insertion: Insertion, was: tuple[str, Any] | None = None) -> Addition:
    """What a node is there for. ``was``: what it called, where it is the model's own."""
    return Addition(insertion.kind, insertion.regularizer or None, insertion.site or None, was)
