"""The rewrite: ``rewrite`` lowers a plan to insertions, and copies each traced graph with these insertions in it.

Each node that it adds has an ``Addition`` in ``node.meta["graphreg"]``, with the kind, the regularizer and the site of the addition.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_aggregate

from graphreg.blocks.homes import OUTSIDE_BLOCKS
from graphreg.blocks.placed_block import new_owner
from graphreg.errors import RegularizerError
from graphreg.ir.call_records import rename_in_calls
from graphreg.ir.call_structures import CallStructures
from graphreg.ir.contents import TensorKind, contents_of, copied_contents, unshared
from graphreg.ir.metadata import Addition, Kind, is_added, label_site, mark, record_calls, surrounding_calls
from graphreg.ir.module_record import state_of
from graphreg.ir.serialize import blank_like
from graphreg.planning.kept import check_keep
from graphreg.planning.plan import Plan, require_sites
from graphreg.regularizer.base import Splice
from graphreg.rewriting.first_call import prove_call
from graphreg.rewriting.insertions import Insertion, Insertions, Position
from graphreg.rewriting.instantiate import make_rules, runtime_module_names
from graphreg.rewriting.invariants import check, require_trained
from graphreg.rewriting.plan_lowering import lower
from graphreg.runtime.attach import AttachRule, Penalties, Scale, check_penalties, check_scale
from graphreg.runtime.build_record import BuildRecord
from graphreg.runtime.clock import clock_of
from graphreg.runtime.result import Kept, Regularized
from graphreg.runtime.rewritten_module import RewrittenModule, unlike_the_model
from graphreg.runtime.runtime_module import Rules
from graphreg.runtime.unseen_changes import UnseenChanges
from graphreg.session.session import Session
from graphreg.torch_internals.interpreter import collector_at_rest
from graphreg.torch_internals.torch_modes import gradients_switched
from graphreg.tracing.proof.proof import NOT_ASKED
from graphreg.tracing.trace import Traced


@collector_at_rest()
def rewrite(
    traced: Traced, plan: Plan, rng: int | torch.Generator | None = None, penalties: Penalties = "return", scale: Scale | None = None
) -> RewrittenModule:
    """Make the module that a plan describes, and check it. The traced model and its graphs stay unchanged.

    Args:
        traced: What ``graphreg.trace`` returned.
        plan: What ``graphreg.plan`` returned for it.
        rng: The seed of the noise: an int, a torch.Generator (one draw), or None (one draw from torch's global generator).
        penalties: ``"return"`` the penalties with the output, or ``"attach"`` them to it.
        scale: For ``penalties="attach"``, the loss scale, as in ``graphreg.regularize``.

    Raises:
        RegularizerError: An argument is not allowed.
        GraphRegError: The plan is for another model, or the rewritten module fails its check.
        TraceError: A site's value cannot be replaced.
    """
    return rewrite_with(traced, plan, rng, penalties, scale)


def rewrite_with(traced: Traced, plan: Plan, noise: Any, penalties: Penalties, scale: Scale | None) -> RewrittenModule:
    """Do what ``rewrite`` does. ``noise``: the ``rng`` of ``rewrite``; or the session of a model in place."""
    check_penalties(penalties)
    check_scale(scale)
    if not isinstance(plan, Plan) or not isinstance(traced, Traced):
        raise RegularizerError("rewrite takes what graphreg.trace gives and what graphreg.plan gives, in this order.")
    check_keep(plan.keep, penalties)
    require_sites(plan, traced)
    names = runtime_module_names(plan)
    rules = make_rules(traced.model, plan, names, noise)
    lowered = {mode: lower(graph, traced, plan, names, penalties) for mode, graph in traced.graphs.items()}
    _settle(rules, lowered.values())
    # The graphs of both modes have the same penalties, so those of the first count.
    if penalties == "attach" and (attached := next(iter(lowered.values())).totals):
        reads = frozenset(traced.specialized).union(*(insertions.reads for insertions in lowered.values()))
        clock = clock_of(rules)  # without one, no strength has a schedule, and each has a buffer
        device = next(iter(rules.strengths.values())).device if clock is None else clock.now.device
        rules.add_module("attach", AttachRule(tuple(attached), scale, device, reads))
    graphs = {mode: inserted(graph, lowered[mode]) for mode, graph in traced.graphs.items()}
    owner = new_owner() if plan.blocks and isinstance(noise, Session) else ""  # only models in place give one
    structures = None if isinstance(noise, Session) else _structures(traced)  # in place, each structure has a graph of its own
    kept = traced.specialized, traced.constants, traced.whole, plan.blocks, owner, structures
    module = RewrittenModule(traced.model, graphs, rules, *kept, checkpoints=traced.checkpoints)
    session = rules.session
    rules.build_record = BuildRecord.of(traced, plan, session.streams.seeds, penalties, scale)
    if not isinstance(noise, Session):
        session.asked, session.scale, session.attaches = rules.build_record.asked, scale, "attach" in rules._modules
    rules.unproved, rules.asks_autocast = dict(traced.unproved), traced.asks_autocast
    rules.prover = prove_call if rules.awaits_proof else None
    if traced.whole and not isinstance(noise, Session):  # a model in place is traced once more when it changes
        sites = dict.fromkeys(edit.site for edit in plan.edits if edit.site.kind == "parameter")
        rules.regularized = tuple(tuple(label.name for label in site.labels) for site in sites)
        spliced = (edit.site for edit in plan.edits if edit.site.kind == "parameter" and isinstance(edit.regularizer, Splice))
        rules.replaced = frozenset(label.name for site in spliced for label in site.labels)
        unseen = UnseenChanges(module)
        rules.unseen = unseen if unseen.hooks or unseen.flags else None
        if unlike := unlike_the_model(traced.model):
            rules.build_record = replace(rules.build_record, notes=(*traced.notes, unlike))
    rules.train(module.training)
    check(module, traced)
    require_trained(module, traced, plan)
    return module


def _structures(traced: Traced) -> CallStructures | None:
    """Return the structures of arguments that a module of this trace accepts; None for graphs of a GraphModule or of Dynamo."""
    if type(traced) is not Traced or isinstance(traced.model, fx.GraphModule):
        state = state_of(traced.model)
        return state.structures if state is not None else None
    given, placeholders = traced.arguments, [n for n in next(iter(traced.graphs.values())).nodes if n.op == "placeholder"]
    names = [str(n.target) for n in placeholders]
    assumed = given is None
    if given is None:
        # Without example inputs, all that has no default is assumed to be a tensor.
        required = [name for name in names if name not in traced.specialized and not name.startswith("*")]
        given = {**dict(traced.specialized), **{name: TensorKind(torch.Tensor, None, 0) for name in required}}
    structures = [dict(given)] if traced.shares else [dict(given), {name: unshared(value) for name, value in given.items()}]
    inputs = frozenset(name.lstrip("*") for name in names if name.lstrip("*") not in traced.specialized)
    proves = NOT_ASKED not in traced.unproved.values()
    defaults = {
        name: copied_contents(each.default) for name, each in inspect.signature(traced.model.forward).parameters.items()
        if name in traced.specialized and each.default is not each.empty and contents_of(each.default) != contents_of(given[name])
    }  # fmt: skip
    loose = traced.front_end != "export"
    return CallStructures(structures, inputs, loose, traced.digest, traced.front_end, proves, defaults, assumed)


def _settle(rules: Rules, lowered: Iterable[Insertions]) -> None:
    """Set the attributes of runtime modules that depend on what the lowering found out about their values."""
    for insertions in lowered:
        facts = {"recomputed": insertions.recomputed, "overwritten": insertions.overwritten, "apart": insertions.apart}
        for fact, names in facts.items():
            for name in names:
                setattr(rules.get_submodule(name), fact, True)


def inserted(graph: fx.Graph, insertions: Insertions) -> fx.Graph:
    """Return a copy of a traced graph with the insertions in it, made in one walk over the graph's nodes.

    In the copy, a node of the model reads, for each of its arguments, the latest insertion that replaces the argument for this reader, or
    else the argument's copy.
    """
    copy, at = blank_like(graph), insertions.by_place
    made: dict[fx.Node | Insertion, fx.Node] = {}  # the node in the copy for each node and each insertion
    present: dict[fx.Node, fx.Node] = {}  # by traced node: what later nodes of the model read in its place
    chosen: dict[fx.Node, dict[fx.Node, fx.Node]] = {}  # by reader: what this reader alone reads, by traced node

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
            rename_in_calls(copy, {n.name: made[n].name for n in graph.nodes if n in made and made[n].name != n.name})
            continue
        instead = at.get((Position.INSTEAD, node))
        twin = copy.node_copy(node, read.__getitem__) if instead is None else _copy_instead(copy, node, instead[0], read, made)
        made[node] = present[node] = twin
        insert(at.get((Position.AFTER, node), ()))
    _keep_gradients(copy)
    return copy


def _keep_gradients(graph: fx.Graph) -> None:
    """Let what was added in a block of ``torch.no_grad`` run outside of it: a value there may be one from outside, or be read there."""
    opened: fx.Node | None = None  # what switches gradients off, whose value says whether they were on
    outside = False  # whether the last node runs outside of the block

    def switch(before: fx.Node, on: fx.Node | bool) -> None:
        with graph.inserting_before(before):
            node = graph.call_function(gradients_switched, (on,))
        mark(node, Addition(Kind.GRADIENTS))
        label_site(node, "")
        record_calls(node, ())

    for node in list(graph.nodes):
        if node.target is gradients_switched:
            opened, outside = node if node.args[0] is False else None, False
        elif opened is not None and node.op != "get_attr" and is_added(node) != outside:
            switch(node, False if outside else opened)
            outside = not outside


def _insert(copy: fx.Graph, insertion: Insertion, made: dict[fx.Node | Insertion, fx.Node]) -> fx.Node:
    node = copy.create_node(insertion.op, insertion.target, *_linked(insertion, made), name=insertion.name)
    mark(node, _addition(insertion))
    if insertion.kind not in OUTSIDE_BLOCKS:
        record_calls(node, surrounding_calls(insertion.anchor))  # a layer's own call does not contain what acts on its output
    return node


def _linked(insertion: Insertion, made: dict[fx.Node | Insertion, fx.Node]) -> tuple[Any, Any]:
    """Return the arguments of an insertion, with nodes of the copy in them."""

    def link(leaf: Any) -> Any:
        return made[leaf] if isinstance(leaf, (fx.Node, Insertion)) else leaf

    return map_aggregate(insertion.args, link), map_aggregate(dict(insertion.kwargs), link)


def _copy_instead(
    copy: fx.Graph, node: fx.Node, insertion: Insertion, read: dict[fx.Node, fx.Node], made: dict[fx.Node | Insertion, fx.Node]
) -> fx.Node:
    """Copy a node so that it calls the insertion's target, with the node's arguments and then the insertion's."""
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
        kept: dict[str, Any] | None = None if insertions.kept is None else {name: made[each] for name, each in insertions.kept.items()}
        value = Regularized(value, totals) if kept is None else Kept(value, totals, kept)
    copy.output(value).meta.update(node.meta)


def _addition(insertion: Insertion, was: tuple[str, Any] | None = None) -> Addition:
    """Make the mark of an insertion's node. ``was``: the former op and target, if the node is a node of the model that was changed."""
    return Addition(insertion.kind, insertion.regularizer or None, insertion.site or None, was)
