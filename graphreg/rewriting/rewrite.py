"""The rewrite: it edits the graphs, with `strip.py`, `substitution.py` and `watches.py` alone. It acts on a plan; it decides nothing.

Every node it adds says so in ``node.meta["graphreg"]``: its kind, its regularizer, its site.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from graphreg.compiler import recomputed
from graphreg.errors import RegularizerError, TraceError
from graphreg.ir import RULES, Aliases, apart, copied, nodes_in, site_nodes
from graphreg.planning import Edit, Plan, require_sites
from graphreg.regularizer import Penalty, Splice
from graphreg.rewriting.instantiate import identifier, leaf_names, make_rules, measures
from graphreg.rewriting.invariants import check
from graphreg.rewriting.substitute import substitute
from graphreg.runtime import (
    AttachRule,
    BuildRecord,
    Penalties,
    Regularized,
    RewrittenModule,
    Scale,
    check_penalties,
    check_scale,
    end_of,
    loss_of,
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
    names = leaf_names(plan)
    rules = make_rules(traced.model, plan, names, rng)
    graphs = {}
    for mode, graph in traced.graphs.items():
        work = _Rewriting(graph, traced, plan, names)
        if penalties == "attach" and work.totals:
            rules.add_module("attach", AttachRule(tuple(work.totals), scale, next(iter(rules.strengths.values())).device))
        work.finish(penalties)
        graphs[mode] = work.graph
        for leaf in work.recomputed:
            rules.get_submodule(leaf).recomputed = True  # type: ignore[assignment]
        for leaf in work.overwritten:
            rules.get_submodule(leaf).overwritten = True  # type: ignore[assignment]
        for leaf in work.apart:
            rules.get_submodule(leaf).apart = True  # type: ignore[assignment]
    module = RewrittenModule(traced.model, graphs, rules, traced.held, traced.constants, traced.whole)
    rules.build_record = BuildRecord.of(traced, plan)
    rules.train(module.training)
    check(module, traced, plan)
    return module


class _Rewriting:
    """The work on one graph: splices and measurements at their sites first, totals and output last."""

    def __init__(self, graph: fx.Graph, traced: Traced, plan: Plan, names: Mapping[int | str, str]) -> None:
        self.graph, self.plan, self.names = copied(graph), plan, names
        self.where = site_nodes(self.graph, traced.operations)
        self.aliases, self.operations = Aliases(self.graph, traced.operations), traced.operations
        self.own = {n.meta["site"][1][0].text: n for n in self.graph.nodes if n.meta.get("site", ("", ()))[1]}
        self.recomputed: list[str] = []
        self.overwritten: list[str] = []  # the leaves of splices whose value something may write into
        self.apart: list[str] = []  # those of which something does, and a penalty measures what they give
        self.inputs = {str(n.target): n for n in self.graph.nodes if n.op == "placeholder"}
        self.calls: dict[int, dict[str, fx.Node]] = {}  # by the edit's place: what it reads at each call of a cell
        self.measured: dict[str, dict[str, fx.Node]] = {name: {} for name, r in plan.regularizers.items() if isinstance(r, Penalty)}
        self.output = self.graph.output_node()
        self.wrt: dict[str, fx.Node] = {}  # by site: the values that derivatives are taken with respect to
        by_site: dict[str, list[tuple[int, Edit]]] = {name: [] for name in plan.tracked if name in self.where}
        for i, edit in enumerate(plan.edits):
            for site in edit.sites:
                if site.kind == "value" and site.name in self.where:
                    by_site.setdefault(site.name, []).append((i, edit))
        self.top, self.key = self._top(by_site.values())
        written = {name: self._written(name, edits, traced) for name, edits in by_site.items()}
        for name, edits in by_site.items():
            self._site(name, edits, written[name])
        for i in self.calls:
            self._sequence(i, plan.edits[i])
        self.totals = self._totals()
        self._substitute()

    def _top(self, sites: Any) -> tuple[fx.Node | None, fx.Node | None]:
        """The last node of the head of the graph, and the key node if anything draws."""
        top = next(reversed(self.inputs.values()), None)
        own = [edit.own for edit in self.plan.own if edit.draws and edit.own.site.name in self.own]
        drawn = any(isinstance(edit.regularizer, Splice) or edit.name in self.plan.cones for edits in sites for _, edit in edits)
        if not own and not drawn:
            return top, None
        place = self.graph.inserting_after(top) if top else self.graph.inserting_before(next(iter(self.graph.nodes)))
        with place:
            key = self._add("key", "key", (True,) if any(each.when == "always" for each in own) else (), "key")
        return key, key

    def _substitute(self) -> None:
        """Leaves in the place of the model's own dropouts; last, for what else looks at the graph goes by the model's calls."""
        for i, edit in enumerate(self.plan.own, len(self.plan.edits)):
            node = self.own.get(edit.own.site.name)
            if node is None:  # the other mode's graph has it
                continue
            if node.args and isinstance(node.args[0], fx.Node) and recomputed(node.args[0], self.operations):
                self.recomputed.append(self.names[i])
            substitute(node, f"{RULES}.{self.names[i]}", edit.own.site.name, self.key if edit.draws else None)

    def _written(self, name: str, edits: Sequence[tuple[int, Edit]], traced: Traced) -> bool:
        """Whether the value is written into later; a splice cannot follow a write that goes by another name."""
        node = self.where[name]
        replacing = [*self.plan.tracked.get(name, ()), *(edit.name for _, edit in edits if isinstance(edit.regularizer, Splice))]
        if replacing and (culprit := self.aliases.written_aside(node)):
            raise TraceError(
                f"{replacing[0]} cannot replace the value {name} of {traced.title}: {culprit.name} writes into its storage "
                "under another name, and would write past the replacement. Choose the site after that write, or clone before it."
            )
        if replacing and (reader := self.aliases.read_past(node)):
            raise TraceError(
                f"{replacing[0]} cannot replace the value {name} of {traced.title}: {reader.name} reads the storage that it lies in, and "
                f"the replacement has another. Choose {reader.name} or a site behind it."
            )
        return self.aliases.written_later(node, surely=bool(replacing) and not self.plan.reads_replaced(name))

    def _site(self, name: str, edits: Sequence[tuple[int, Edit]], written: bool) -> None:
        """What tracks it, clean measurements, splices in order, measurements; a copy where somebody writes into the value later.

        Measurements read the copy, and the model's own operations what they always read. Behind a splice the copy is
        for the model's operations, so that nothing writes into what a splice has saved for backward.
        """
        node = self.where[name]
        value, point, added = node, node if node.op != "placeholder" else self.top or node, set[fx.Node]()
        spliced = any(isinstance(edit.regularizer, Splice) for _, edit in edits)
        tracked = name in self.plan.tracked
        given = (spliced or tracked) and self.aliases.is_given(node)

        def after(leaf: str, args: tuple[Any, ...], kind: str, edit: Edit | None = None) -> fx.Node:
            nonlocal point
            with self.graph.inserting_after(point):
                point = self._add(leaf, leaf, args, kind, edit)
            added.add(point)
            return point

        def kept(kind: str) -> fx.Node:
            nonlocal point
            function, args = (apart, (value, node)) if given and kind == "clone" else (self.aliases.clone_of(node), (value,))
            with self.graph.inserting_after(point):
                point = self.graph.create_node("call_function", function, args, name=f"{identifier(name)}_kept")
            point.meta["graphreg"] = {"kind": kind, "site": name}
            added.add(point)
            return point

        def measure(clean: bool) -> None:
            for i, edit in edits:
                if not isinstance(edit.regularizer, Penalty) or edit.regularizer.clean != clean:
                    continue
                if edit.steps and edit.steps.calls:  # measured after the last call
                    self.calls.setdefault(i, {})[name] = read
                    continue
                leaf = after(self.names[i], (read, *self._lengths(edit)), "measure", edit) if measures(edit.regularizer) else read
                self.measured[edit.name][name] = leaf

        if tracked:
            self.wrt[name] = value = after(self.names[name], (value,), "track")
            value.meta["graphreg"]["site"] = name
        clean = any(isinstance(edit.regularizer, Penalty) and edit.regularizer.clean for _, edit in edits)
        overwritten = self.aliases.written_later(node) if spliced else written and not tracked
        read = kept("copy") if overwritten and (clean or not spliced) else value
        measure(clean=True)
        if spliced and recomputed(node, self.operations):
            self.recomputed += [self.names[i] for i, edit in edits if isinstance(edit.regularizer, Splice)]
        leaves = [self.names[i] for i, edit in edits if isinstance(edit.regularizer, Splice)]
        if leaves and overwritten:
            self.overwritten += leaves
            self.apart += leaves[:1] if written and not given and any(isinstance(edit.regularizer, Penalty) for _, edit in edits) else []
        for i, edit in edits:
            if isinstance(edit.regularizer, Splice):
                read = value = after(self.names[i], (value, self.key), "splice", edit)
        if given and written and any(isinstance(edit.regularizer, Penalty) and not edit.regularizer.clean for _, edit in edits):
            read = kept("copy")
        measure(clean=False)
        if written and (spliced or tracked):
            value = kept("clone")
        if value is not node:
            node.replace_all_uses_with(value, delete_user_cb=lambda user: user not in added)

    def _lengths(self, edit: Edit) -> list[fx.Node]:
        """The input that carries the lengths of a sequence, where the penalty names one."""
        if edit.steps is None or edit.steps.lengths is None:
            return []
        node = self.inputs[edit.steps.lengths]
        if self.aliases.written_later(node, surely=True):
            raise TraceError(f"{edit.name}: the model writes into its input {node.target!r}, which lengths= names. Clone it there first.")
        return [node]

    def _sequence(self, i: int, edit: Edit) -> None:
        """The measurement of a cell's calls, after the last of them."""
        read = tuple(self.calls[i][site.name] for site in edit.sites if site.name in self.calls[i])
        with self.graph.inserting_after(self.top if self.top and max(read).op == "placeholder" else max(read)):
            self.measured[edit.name][edit.site.name] = self._add(
                self.names[i], self.names[i], (read, *self._lengths(edit)), "measure", edit
            )

    def _add(self, leaf: str, name: str, args: tuple[Any, ...], kind: str, edit: Edit | None = None) -> fx.Node:
        node = self.graph.create_node("call_module", f"{RULES}.{leaf}", args, name=name)
        node.meta["graphreg"] = {"kind": kind} | ({"regularizer": edit.name, "site": edit.site.name} if edit else {})
        return node

    def _totals(self) -> dict[str, fx.Node]:
        """One node a penalty, at the end, reading its sites in the order of the plan."""
        totals: dict[str, fx.Node] = {}
        for name, measured in self.measured.items():
            if name in self.plan.cones:
                totals[name] = self._derivative(name, measured)
                continue
            with self.graph.inserting_before(end_of(self.output)):
                edits = [edit for edit in self.plan.of(name) if edit.site.kind == "parameter" or edit.site.name in measured]
                values = {edit.site.name: measured.get(edit.site.name) or self._read(edit) for edit in edits}
                whole = "values" in self.plan.regularizers[name].takes
                totals[name] = self._add(name, name, (values,) if whole else tuple(values.values()), "total")
                totals[name].meta["graphreg"]["regularizer"] = name
        return totals

    def _derivative(self, name: str, values: Mapping[str, fx.Node]) -> fx.Node:
        """A penalty on derivatives, after the last of its sites: with respect to what is tracked for it."""
        wrt = {site.name: self.wrt[site.name] for site in self.plan.cones[name].wrt if site.name in self.wrt}
        ordered = {edit.site.name: values[edit.site.name] for edit in self.plan.of(name) if edit.site.name in values}
        last = max([n for n in (*ordered.values(), *wrt.values(), self.key) if n is not None], default=None)
        with self.graph.inserting_after(last) if last and ordered else self.graph.inserting_before(end_of(self.output)):
            node = self._add(name, name, (ordered, wrt, self.key), "total")
        node.meta["graphreg"]["regularizer"] = name
        return node

    def _read(self, edit: Edit) -> fx.Node:
        node = self.graph.create_node("get_attr", edit.site.name, name=identifier(edit.site.name))
        node.meta["graphreg"] = {"kind": "read", "regularizer": edit.name, "site": edit.site.name}
        return node

    def finish(self, penalties: Penalties) -> None:
        if penalties == "return":
            self.output.args = (Regularized(self.output.args[0], self.totals),)  # type: ignore[arg-type]
        elif self.totals:
            self._attach()

    def _attach(self) -> None:
        end, loss = end_of(self.output), loss_of(self.output)
        outputs = [loss] if loss is not None else list(dict.fromkeys(nodes_in((end.args, end.kwargs))))
        with self.graph.inserting_before(end):
            joined = self._add("attach", "attach", (tuple(outputs), tuple(self.totals.values()), loss is not None), "attach")
            for i, node in enumerate(outputs):
                item = self.graph.create_node("call_function", operator.getitem, (joined, i), name=f"{node.name}_attached")
                item.meta["graphreg"] = {"kind": "attached"}
                end.replace_input_with(node, item)
