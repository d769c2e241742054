"""Whether every edit of a plan stands at its site, in its order, and nothing passes it by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from graphreg.errors import GraphRegError
from graphreg.ir import RULES, Aliases, Kind, Steps, addition_of, apart, is_kind, is_marked, site_nodes
from graphreg.planning import Edit, Plan
from graphreg.regularizer import Penalty, Splice
from graphreg.rewriting.instantiate import measures
from graphreg.tracing import Traced


def failed(sentence: str) -> GraphRegError:
    return GraphRegError(f"a rewritten graph failed its check: {sentence}")


def fail(sentence: str) -> None:
    raise failed(sentence)


def placed_in(graph: fx.Graph, original: fx.Graph, traced: Traced, plan: Plan) -> Placed:
    """What stands in a rewritten graph, and what must, by the graph that was traced and the plan alone.

    Raises GraphRegError where a regularizer acts twice at a site.
    """
    first, aliases = site_nodes(original, traced.operations), Aliases(original, traced.operations)
    sites = {name for name in (*plan.by_site, *plan.tracked) if name in first}
    definite = {name: bool(plan.splices(name)) and not plan.reads_replaced(name) for name in sites}
    written = {name for name in sites if aliases.written_later(first[name], is_definite=definite[name])}
    overwritten = {name for name in sites if aliases.written_later(first[name])}
    added, tracks = _added(graph)
    return Placed(
        graph,
        plan,
        where={name: node for name, node in site_nodes(graph, traced.operations).items() if not is_marked(node)},
        aliases=Aliases(graph, traced.operations),
        written=written,
        overwritten=overwritten,
        clones={name: aliases.clone_of(first[name]) for name in overwritten},
        external={n for n in written if (plan.splices(n) or n in plan.tracked) and aliases.is_external(first[n])},
        added=added,
        tracks=tracks,
    )


def _added(graph: fx.Graph) -> tuple[dict[tuple[str, str], fx.Node], dict[str, fx.Node]]:
    """The nodes that act for a regularizer at a site, and those that track a site."""
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
    """Every edit of the plan stands at its site, in its order, and nothing passes it by.

    Attributes:
        graph: The rewritten graph, with the model's own calls in it.
        plan: What was planned.
        where: The model's own nodes in it, by site.
        aliases: Who shares storage in it, and who writes.
        written: The sites whose value somebody writes into later.
        overwritten: Those where it may be so.
        clones: What copies their values.
        external: Those of ``written`` that are replaced, and whose storage may be the caller's or the model's.
        added: By regularizer and site, the node that acts there.
        tracks: By site, the node that tracks it.
        needed_copies: The copies that were found to be needed.
        reads: Of the edits at all calls of a cell, the value at each.
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
    needed_copies: set[fx.Node] = field(default_factory=set)
    reads: dict[tuple[str, str], dict[str, fx.Node]] = field(default_factory=dict)

    def check(self) -> None:
        """Raise TraceError unless every addition of the plan stands at its place, and nothing else was added."""
        counted = 0
        for name in self.tracks.keys() | (self.plan.tracked.keys() & self.where.keys()):
            node = self.tracks.get(name)
            if node is None or name not in self.plan.tracked or node.args != (self.where.get(name),):
                fail(f"the value {name}, which a penalty differentiates by, is not tracked from where it is produced.")
        for name, edits in ({site: list[Edit]() for site in self.tracks} | self.plan.by_site).items():
            if edits and edits[0].site.kind == "parameter":
                counted += sum(self._reads(edit) for edit in edits)
            elif name in self.where:
                counted += self._chain(self.where[name], name, edits)
        for edit in self.plan.edits:
            if edit.steps is not None:
                counted += self._sequence(edit, edit.steps)
        copies = {n for n in self.graph.nodes if is_kind(n, Kind.CLONE, Kind.COPY)}
        if counted != len(self.added) or copies != self.needed_copies:
            fail("there are additions that are not in the plan.")

    def _reads(self, edit: Edit) -> int:
        node = self.added.get((edit.name, edit.site.name))
        if node is None or node.op != "get_attr" or node.target != edit.site.name:
            fail(f"{edit.name} does not read the parameter {edit.site.name}.")
        return 1

    def _chain(self, node: fx.Node, name: str, edits: list[Edit]) -> int:
        """Clean measurements read the value, splices follow in order, the rest reads the last."""
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
            if self.aliases.written_between(node, copy):
                fail(f"{copy.name} copies {node.name} after it was overwritten.")
        count += self._measured(name, edits, copies[0] if copies else value, aside[0] if aside else start)
        value = clones[0] if clones else value
        if value is not node:
            self._passed_by(node, value)
        return count

    def _note_copies(
        self, name: str, edits: list[Edit], value: fx.Node, copies: list[fx.Node], protecting: list[fx.Node], aside: list[fx.Node]
    ) -> None:
        """The copies that the site needs, of those that are there."""
        self.needed_copies.update(protecting[:1] if name in self.written else [])
        if name in self.external and value is not self.where[name] and any(map(_reads_spliced, edits)):
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
        """How many measurements act on what they are to read: ``clean`` before the splices, the others behind them."""
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
        """Whether a penalty needs what the splices replace, and somebody writes into that later."""
        clean = any(isinstance(edit.regularizer, Penalty) and edit.regularizer.clean for edit in edits)
        return clean and name in self.overwritten and _has_splice(edits)

    def _sequence(self, edit: Edit, steps: Steps) -> int:
        """A sequence is read at its site, or at every call of its cell, in their order, with its own lengths."""
        values = self.reads.get((edit.name, edit.site.name), {})
        if not values:  # a mode in which none of the calls is reached
            return 0
        node = self.added.get((edit.name, edit.site.name))
        ordered = tuple(values[site.name] for site in edit.sites if site.name in values)
        if node is None or node.args[:1] != ((ordered if steps.calls else ordered[0]),):
            raise failed(f"{edit.name} does not act on {', '.join(value.name for value in ordered)}.")
        for value in ordered:
            self._in_time(edit, value, node)
        inputs = [n.target if isinstance(n, fx.Node) and n.op == "placeholder" else None for n in node.args[1:]]
        if inputs != ([steps.lengths] if steps.lengths is not None else []):
            fail(f"{edit.name} at {edit.site.name} does not take the lengths {steps.lengths!r}.")
        return 1

    def _users(self, value: fx.Node, kind: Kind) -> list[fx.Node]:
        return [user for user in value.users if is_kind(user, kind)]

    def read(self, edit: Edit) -> fx.Node:
        """The value that a penalty on all values at once reads at one of its sites."""
        if edit.site.kind == "parameter":
            return self.added[edit.name, edit.site.name]
        value = self.tracks.get(edit.site.name, self.where[edit.site.name])
        clean = isinstance(edit.regularizer, Penalty) and edit.regularizer.clean
        if (copies := self._users(value, Kind.COPY)) and (clean or not self.plan.splices(edit.site.name)):
            return copies[0]
        if clean:
            return value
        for other in self.plan.splices(edit.site.name):
            value = self.added[other.name, edit.site.name]
        return next(iter(self._users(value, Kind.COPY)), value)

    def derivative(self, name: str, edits: Sequence[Edit]) -> tuple[object, ...]:
        """The arguments of a penalty on derivatives: its sites' values, what it differentiates by, the keys of the call."""
        keys = [node for node in self.graph.nodes if is_kind(node, Kind.KEY)]
        wrt = {site.name: self.tracks[site.name] for site in self.plan.slices[name].wrt if site.name in self.tracks}
        return {edit.site.name: self.read(edit) for edit in edits}, wrt, keys[0] if keys else None

    def _follows(self, edit: Edit, value: fx.Node) -> fx.Node:
        node = self.added.get((edit.name, edit.site.name))
        if node is None or node.args[0] is not value or not str(node.target).startswith(f"{RULES}."):
            raise failed(f"{edit.name} does not act on {value.name} at the site {edit.site.name}.")
        self._in_time(edit, value, node)
        return node

    def _in_time(self, edit: Edit, value: fx.Node, node: fx.Node) -> None:
        if self.aliases.written_between(value, node):
            fail(f"{edit.name} reads {value.name} after it was overwritten.")

    def _passed_by(self, node: fx.Node, last: fx.Node) -> None:
        """Nothing of the model's own reads the value at ``node`` or between, only what stands at the end."""
        chain = [last]
        while chain[-1] is not node:
            chain.append(chain[-1].args[0])  # type: ignore[arg-type]
        for link in chain[1:]:
            for user in link.users:
                if not is_marked(user):
                    fail(f"{user.name} reads {link.name} and passes by {last.name}.")


def _reads_spliced(edit: Edit) -> bool:
    return isinstance(edit.regularizer, Penalty) and not edit.regularizer.clean


def _has_splice(edits: Sequence[Edit]) -> bool:
    return any(isinstance(edit.regularizer, Splice) for edit in edits)
