"""Checks that every edit of a plan acts at its site, in the plan's order, and that the model reads only the value after the last splice.

``placed_in`` looks at a rewritten graph, and ``Placed.check`` compares what it found with the plan.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from graphreg.ir.aliasing import Aliases
from graphreg.ir.layout import apart
from graphreg.ir.metadata import Kind, addition_of, is_kind, is_marked
from graphreg.ir.module_record import RULES
from graphreg.ir.operations import nodes_in
from graphreg.ir.roles import labels_of, site_nodes
from graphreg.ir.time_steps import Steps
from graphreg.planning.kept import KeptValue
from graphreg.planning.plan import Edit, Plan
from graphreg.regularizer.base import Penalty, Splice
from graphreg.rewriting.instantiate import measures
from graphreg.rewriting.invariants import fail
from graphreg.runtime.result import Kept, output_of
from graphreg.tracing.trace import Traced


def placed_in(graph: fx.Graph, original: fx.Graph, traced: Traced, plan: Plan) -> Placed:
    """Find the additions in a rewritten graph, and work out from the traced graph and the plan which copies it needs.

    Raises GraphRegError if a regularizer acts twice at a site, or if a site is tracked twice.
    """
    first, aliases = site_nodes(original, traced.operations), Aliases(original, traced.operations)
    keeps = _keeps(first, traced, plan)
    sites = {name for name in (*_values(plan), *plan.tracked, *keeps) if name in first}
    read = {name for name in sites if plan.reads_replaced(name) or any(each.form == "spliced" for each in keeps.get(name, ()))}
    definite = {name: bool(plan.splices(name)) and name not in read for name in sites}
    written = {name for name in sites if aliases.written_later(first[name], is_definite=definite[name])}
    overwritten = {name for name in sites if aliases.written_later(first[name])}
    added, tracks = _added(graph)
    here = Aliases(graph, traced.operations)
    return Placed(
        graph,
        plan,
        where={name: node for name, node in site_nodes(graph, traced.operations).items() if not is_marked(node)},
        aliases=here,
        written=written,
        overwritten=overwritten,
        clones={name: aliases.clone_of(first[name]) for name in overwritten},
        external={n for n in written if (plan.splices(n) or n in plan.tracked) and aliases.is_external(first[n])},
        added=added,
        tracks=tracks,
        keeps=keeps,
        writers=[
            (node, frozenset[fx.Node]().union(*map(here.bases, into))) for node in graph.nodes if (into := here.effects.writes(node))
        ],
    )


def _keeps(nodes: dict[str, fx.Node], traced: Traced, plan: Plan) -> dict[str, list[KeptValue]]:
    """Return what the plan keeps at each site of a traced graph, of which ``nodes`` has the nodes by site."""
    labels = {label.text: name for name, node in nodes.items() for label in labels_of(node, traced.operations)}
    keeps: dict[str, list[KeptValue]] = {}
    for each in plan.kept:
        for name in each.names:
            if name in labels:
                keeps.setdefault(labels[name], []).append(each)
    return keeps


def _added(graph: fx.Graph) -> tuple[dict[tuple[str, str], fx.Node], dict[str, fx.Node]]:
    """Return the nodes that act for a regularizer, by its name and the site, and the nodes that track a site, by the site."""
    added: dict[tuple[str, str], fx.Node] = {}
    tracks: dict[str, fx.Node] = {}
    for node in graph.nodes:
        addition = addition_of(node)
        if addition is None:
            continue
        name, site = str(addition.regularizer), str(addition.site)
        if addition.kind in (Kind.SPLICE, Kind.MEASURE, Kind.READ):
            if (name, site) in added:
                fail(f"{name} acts twice at {site}.")
            added[name, site] = node
        elif addition.kind == Kind.TRACK:
            if site in tracks:
                fail(f"{site} is tracked twice.")
            tracks[site] = node
    return added, tracks


@dataclass
class Placed:
    """What ``placed_in`` found in a rewritten graph, and the checks of what it found.

    Attributes:
        graph: The rewritten graph, in which native dropouts again call what they call in the model.
        plan: The plan.
        where: By site, the model's own node in ``graph``.
        aliases: Which values of ``graph`` share storage, and which nodes write into it.
        written: The sites whose value needs a copy, because the model writes into it later. A write that may happen is enough. But if the
            site has splices, and no penalty reads their result or differentiates by the value, only a write that certainly happens counts.
        overwritten: The sites whose value the model may write into later.
        clones: For each site in ``overwritten``, the function that copies its value.
        external: The sites of ``written`` whose value is replaced, and whose storage may belong to the caller or to the model.
        added: By regularizer and site, the node that acts there.
        tracks: By site, the node that tracks it.
        keeps: By site, what is kept there.
        writers: The nodes that may write into a value of ``graph``, each with the bases of what it writes into.
        needed_copies: The copies that the checks so far have found to be needed.
        reads: A dict for penalties on sequences. Each key is a penalty's name and its edit's site; the value is a dict from each site of
            the sequence to the node that the penalty must read there.
    """

    graph: fx.Graph
    plan: Plan
    where: dict[str, fx.Node]
    aliases: Aliases
    written: set[str]
    overwritten: set[str]
    clones: dict[str, Callable[..., Any]]
    external: set[str]
    added: dict[tuple[str, str], fx.Node]
    tracks: dict[str, fx.Node]
    keeps: dict[str, list[KeptValue]]
    writers: list[tuple[fx.Node, frozenset[fx.Node]]]
    needed_copies: set[fx.Node] = field(default_factory=set)
    reads: dict[tuple[str, str], dict[str, fx.Node]] = field(default_factory=dict)

    def check(self) -> None:
        """Raise GraphRegError unless every addition of the plan stands at its place, and nothing else was added."""
        counted = 0
        for name in self.tracks.keys() | (self.plan.tracked.keys() & self.where.keys()):
            node = self.tracks.get(name)
            if node is None or name not in self.plan.tracked or node.args != (self.where.get(name),):
                fail(f"the value {name} must have a track node, directly after its node, if and only if a penalty differentiates by it.")
        for name, edits in ({site: list[Edit]() for site in (*self.tracks, *self.keeps)} | _values(self.plan)).items():
            if name in self.where:
                counted += self._chain(self.where[name], name, edits)
        counted += sum(self._reads(edit) for edit in self.plan.edits if edit.site.kind == "parameter")
        for edit in self.plan.edits:
            if edit.steps is not None and isinstance(edit.regularizer, Penalty):
                counted += self._sequence(edit, edit.steps)
        copies = {n for n in self.graph.nodes if is_kind(n, Kind.CLONE, Kind.COPY)}
        if counted != len(self.added) or copies != self.needed_copies:
            fail("there are additions that are not in the plan.")
        self._kept()

    def _kept(self) -> None:
        """Check that the output returns exactly what the plan keeps in this graph, each value as it is read at its site."""
        result = self.graph.output_node().args[0]
        if isinstance(result, Kept) != (self.plan.keep is not None):
            fail("it must return Kept if and only if the plan keeps values.")
        for each in self.plan.kept:
            wanted = [self.read_at(site, each.form == "clean") for site, kept in self.keeps.items() if each in kept]
            wanted.sort(key=self.aliases.order.__getitem__)
            value = result.values.get(each.name)
            if each.calls and wanted:
                steps = list(value.args[0]) if value is not None and is_kind(value, Kind.KEEP) else []
            else:
                steps = [value] if value is not None else []
            if steps != wanted or any(self._written_between(self.where[s], n) for s, k in self.keeps.items() if each in k for n in wanted):
                fail(f"what it keeps as {each.name} is not the value of its site.")

    def _reads(self, edit: Edit) -> int:
        """Check that a node reads the parameter of an edit, and return 1. For a splice, return 1 if it is there, else 0.

        ``check_parameters`` checks what splices on parameters read. A penalty with ``by="prox"`` reads none.
        """
        node = self.added.get((edit.name, edit.site.name))
        if edit.replaces_parameter or edit.regularizer.by_prox:
            return int(node is not None)
        if node is None or node.op != "get_attr" or node.target != edit.site.name:
            fail(f"{edit.name} does not read the parameter {edit.site.name}.")
        return 1

    def _chain(self, node: fx.Node, name: str, edits: list[Edit]) -> int:
        """Check the additions at one site, and return how many act there.

        Measurements with ``clean=True`` must read the value itself, splices must follow it in order, and the other measurements and the
        model must read the value after the last splice.
        """
        value, count = self.tracks.get(name, node), 0
        start = value
        for edit in edits:
            if isinstance(edit.regularizer, Splice):
                value = self._follows(edit, value)
                count += 1
        copies, clones = self._users(value, Kind.COPY), self._users(value, Kind.CLONE)
        protecting = clones if value is not node else copies
        aside = self._users(start, Kind.COPY) if value is not start else []
        self._note_copies(name, edits, value, copies, protecting, aside)
        self._check_layout(node, name, copies, clones, aside)
        self._check_written(name, edits, start, value, protecting, aside)
        for copy in (*copies, *aside):
            if self._written_between(node, copy):
                fail(f"{copy.name} copies {node.name} after it was overwritten.")
        count += self._measured(name, edits, copies[0] if copies else value, aside[0] if aside else start)
        value = clones[0] if clones else value
        if value is not node:
            self._passed_by(node, value)
        return count

    def _note_copies(
        self, name: str, edits: list[Edit], value: fx.Node, copies: list[fx.Node], protecting: list[fx.Node], aside: list[fx.Node]
    ) -> None:
        """Add to ``needed_copies`` those of the site's copies that the plan makes necessary."""
        self.needed_copies.update(protecting[:1] if name in self.written else [])
        replaces_alone = name in self.written and not _has_splice(edits)  # a track node replaces the value, and no splice does
        measured = _is_measured(edits) or any(each.form == "spliced" or not _has_splice(edits) for each in self.keeps.get(name, ()))
        if (name in self.external or replaces_alone) and value is not self.where[name] and measured:
            if not copies:
                fail(f"{value.name} is overwritten by a later operation while a penalty needs it.")
            self.needed_copies.update(copies[:1])
        self.needed_copies.update(aside[:1] if self._reads_aside(name, edits) else [])

    def _check_layout(self, node: fx.Node, name: str, copies: list[fx.Node], clones: list[fx.Node], aside: list[fx.Node]) -> None:
        expected = self.clones.get(name)
        if any(copy.target is not expected for copy in (*copies, *aside)) or any(
            clone.target is not (apart if name in self.external else expected) or clone.args[1:] not in ((), (node,)) for clone in clones
        ):
            fail(f"the copy of {name} does not lie in memory as the value does.")

    def _check_written(
        self, name: str, edits: list[Edit], start: fx.Node, value: fx.Node, protecting: list[fx.Node], aside: list[fx.Node]
    ) -> None:
        if name in self.written and not protecting:
            fail(f"{value.name} is overwritten by a later operation while {edits[0].name if edits else 'a derivative'} needs it.")
        if self._reads_aside(name, edits) and not aside:
            fail(f"{start.name} is overwritten by a later operation while a penalty with clean=True needs it.")

    def _measured(self, name: str, edits: list[Edit], read: fx.Node, clean: fx.Node) -> int:
        """Check which node each measurement reads, and return the number of measurements.

        If the penalty has ``clean=True`` and the site has splices, the measurement must read the node ``clean``, else the node ``read``.

        For a measurement of a sequence, the node is only noted in ``self.reads``: ``_sequence`` checks it.
        """
        count = 0
        for edit in edits:
            if not isinstance(edit.regularizer, Penalty) or not measures(edit.regularizer):
                continue
            measured = clean if edit.regularizer.clean and _has_splice(edits) else read
            if edit.steps is not None:
                self.reads.setdefault((edit.name, edit.site.name), {})[name] = measured
                continue
            self._follows(edit, measured)
            count += 1
        return count

    def _reads_aside(self, name: str, edits: Sequence[Edit]) -> bool:
        """Whether a penalty with ``clean=True`` reads the value that splices replace, and the model may write into this value later."""
        clean = any(isinstance(edit.regularizer, Penalty) and edit.regularizer.clean for edit in edits)
        clean = clean or any(each.form == "clean" for each in self.keeps.get(name, ()))
        return clean and name in self.overwritten and _has_splice(edits)

    def _sequence(self, edit: Edit, steps: Steps) -> int:
        """Check that a penalty reads its sequence. Return 1; return 0 if this graph has none of the sites.

        A sequence is one value, or the outputs of all calls of a cell in order.
        """
        values = self.reads.get((edit.name, edit.site.name), {})
        if not values:  # the graph is that of a mode in which the forward reaches none of the sites
            return 0
        node = self.added.get((edit.name, edit.site.name))
        ordered = tuple(values[site.name] for site in edit.sites if site.name in values)
        if node is None or node.args[:1] != ((ordered if steps.calls else ordered[0]),):
            fail(f"{edit.name} does not act on {', '.join(value.name for value in ordered)}.")
        for value in ordered:
            self._in_time(edit, value, node)
        return 1

    def _users(self, value: fx.Node, kind: Kind) -> list[fx.Node]:
        return [user for user in value.users if is_kind(user, kind)]

    def read(self, edit: Edit) -> fx.Node:
        """For a penalty whose formula takes the values of all sites at once: return the value that it must read at one of these sites."""
        if edit.site.kind == "parameter":
            return self.added[edit.name, edit.site.name]
        return self.read_at(edit.site.name, isinstance(edit.regularizer, Penalty) and edit.regularizer.clean)

    def read_at(self, site: str, clean: bool) -> fx.Node:
        """Return what is to be read of the value of a site: before the splices there if ``clean``, else behind them."""
        value = self.tracks.get(site, self.where[site])
        if (copies := self._users(value, Kind.COPY)) and (clean or not self.plan.splices(site)):
            return copies[0]
        if clean:
            return value
        for other in self.plan.splices(site):
            value = self.added[other.name, site]
        return next(iter(self._users(value, Kind.COPY)), value)

    def derivative(self, name: str, edits: Sequence[Edit]) -> tuple[object, ...]:
        """Return the arguments that a penalty on derivatives must have: its sites' values, those that ``wrt`` selects, the call's keys."""
        keys = [node for node in self.graph.nodes if is_kind(node, Kind.KEY)]
        wrt = {site.name: self.tracks[site.name] for site in self.plan.slices[name].wrt if site.name in self.tracks}
        return {edit.site.name: self.read(edit) for edit in edits}, wrt, keys[0] if keys else None

    def _follows(self, edit: Edit, value: fx.Node) -> fx.Node:
        """Return the node of an edit; raise GraphRegError unless it reads ``value``."""
        node = self.added.get((edit.name, edit.site.name))
        if node is None or node.args[0] is not value or not str(node.target).startswith(f"{RULES}."):
            fail(f"{edit.name} does not act on {value.name} at the site {edit.site.name}.")
        self._in_time(edit, value, node)
        return node

    def _written_between(self, node: fx.Node, reader: fx.Node) -> bool:
        """Return whether an operation after ``node`` and before ``reader`` may write into the value of ``node``."""
        if not self.writers:  # else bases are asked for, which probes operations
            return False
        order, bases = self.aliases.order, self.aliases.bases(node)
        return any(order[node] < order[writer] < order[reader] and not bases.isdisjoint(written) for writer, written in self.writers)

    def _in_time(self, edit: Edit, value: fx.Node, node: fx.Node) -> None:
        """Check that nothing writes into ``value`` before ``node`` reads it."""
        if self._written_between(value, node):
            fail(f"{edit.name} reads {value.name} after it was overwritten.")

    def _passed_by(self, node: fx.Node, last: fx.Node) -> None:
        """Check that the model's own nodes read ``last``, which replaces ``node``, and do not read ``node`` or a value between the two."""
        chain = [last]
        while chain[-1] is not node:
            chain.append(chain[-1].args[0])  # type: ignore[arg-type]
        for link in chain[1:]:
            for user in link.users:
                # what is kept of a value may be what it was before the splices
                if not is_marked(user) and (user.op != "output" or link in nodes_in(output_of(user.args[0]))):
                    fail(f"{user.name} reads {link.name} and not {last.name}, which replaces it.")


def _values(plan: Plan) -> dict[str, list[Edit]]:
    """Return the edits at each site that is a value, by the site's name."""
    edits = {name: [edit for edit in edits if edit.site.kind == "value"] for name, edits in plan.by_site.items()}
    return {name: at_site for name, at_site in edits.items() if at_site}


def _is_measured(edits: Sequence[Edit]) -> bool:
    """Whether a penalty reads the value after the last splice. Without splices, penalties with ``clean=True`` read it, too."""
    return any(isinstance(edit.regularizer, Penalty) and not (edit.regularizer.clean and _has_splice(edits)) for edit in edits)


def _has_splice(edits: Sequence[Edit]) -> bool:
    return any(isinstance(edit.regularizer, Splice) for edit in edits)
