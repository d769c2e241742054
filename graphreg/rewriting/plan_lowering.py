"""The lowering: ``lower`` turns a plan into the list of insertions for one traced graph. It changes neither plan nor graph."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphreg.compiler.recompute import recomputed
from graphreg.errors import TraceError
from graphreg.ir.aliasing import Aliases
from graphreg.ir.cell_states import state_before
from graphreg.ir.containers import end_of, loss_of
from graphreg.ir.layout import apart
from graphreg.ir.metadata import Kind, draw_labels, own_name
from graphreg.ir.module_record import RULES
from graphreg.ir.naming import identifier
from graphreg.ir.operations import first_argument, function_name, is_port, nodes_in, takes_apart
from graphreg.ir.parameter_reads import ParameterReads
from graphreg.ir.random_ops import is_random
from graphreg.ir.roles import labels_of, site_nodes
from graphreg.planning.kept import KeptValue
from graphreg.planning.plan import Edit, Plan
from graphreg.regularizer.base import Penalty, Regularizer, Splice
from graphreg.rewriting.insertions import Insertion, Insertions, Position, ValueSource
from graphreg.rewriting.instantiate import measures
from graphreg.rewriting.parameter_lowering import ParameterChain, chain_at, insert_chains
from graphreg.runtime.attach import Penalties
from graphreg.runtime.clock import CLOCK
from graphreg.runtime.containers import with_item
from graphreg.torch_internals.fx import node_namer
from graphreg.tracing.settled_reads import returns_itself, written
from graphreg.tracing.trace import Traced

Edits = Sequence[tuple[int, Edit]]  # each with its index in the plan


def lower(
    graph: fx.Graph, traced: Traced, plan: Plan, names: Mapping[int | str, str], penalties: Penalties = "return"
) -> Insertions:
    """Decide what to insert into one of the traced graphs. Neither the graph nor the plan is changed.

    Args:
        graph: One of ``traced.graphs``, the graphs of the traced model.
        traced: The traced model.
        plan: The plan for it.
        names: The names of the runtime modules, from ``runtime_module_names(plan)``.
        penalties: ``"return"`` the penalties with the output, or ``"attach"`` them to it.

    Raises:
        TraceError: A value cannot be replaced, because the model writes into its storage through another alias or reads the storage
            by ``as_strided``; or the model writes into something else that a formula reads or a splice replaces: an input that an
            option such as ``lengths=`` names, the input of a module or cell, a parameter.
    """
    mode = next(mode for mode, each in traced.graphs.items() if each is graph)
    work = _Lowering(graph, traced, plan, names, mode)
    by_site = work.edits_by_site()
    # Before anything is inserted: this raises for a value that cannot be replaced.
    written = {name: work.is_written(name, edits, traced.title) for name, edits in by_site.items()}
    chains = work.parameter_chains(traced.parameter_reads[mode])

    # Key and clock stand first, because what is inserted later reads them.
    work.add_key([*by_site.values(), *(chain.edits for chain in chains)])
    if plan.is_scheduled:
        work.clock = work.top = work.add_at_top(Kind.CLOCK)
    for name, edits in work.ordered_sites(by_site):
        work.add_site(name, edits, written[name])
    work.add_wholes()
    if chains:
        work.add_parameters(chains)
    for i in work.calls:
        work.add_sequence(i, plan.edits[i])

    # All values are in place, so the penalties can be computed from them.
    end, loss = work.end()
    totals = {name: work.add_total(name, measured, end) for name, measured in work.measured.items()}
    kept = None if plan.keep is None else {each.name: v for each in plan.kept if (v := work.kept_value(each, end)) is not None}
    work.replace_native_dropout()
    reads = work.attach(totals, end, loss) if penalties == "attach" and totals else frozenset[str]()
    marked = tuple(work.recomputed), tuple(work.overwritten), tuple(work.apart)
    return Insertions(work.ordered(), totals, penalties == "return", *marked, reads, kept)


@dataclass
class _InsertionChain:
    """The insertions at one site, each after the previous one.

    Attributes:
        site: The site's name.
        node: The site's node in the traced graph.
        point: The node or insertion after which the next insertion stands.
        value: The latest replacement of the node's value; the node itself if there is none yet.
        read: The value that penalties measure.
    """

    site: str
    node: fx.Node
    point: ValueSource
    value: ValueSource
    read: ValueSource


def _left_at(graph: fx.Graph) -> dict[fx.Node, fx.Node]:
    """Return, for each value that a ``torch.vmap`` of the graph returns, the node that leaves this vmap."""
    left, returned = dict[fx.Node, fx.Node](), list[fx.Node]()
    for node in graph.nodes:
        name = function_name(node)
        if name == "_remove_batch_dim":
            returned.append(node)
        elif name.endswith("_decrement_nesting"):
            left |= dict.fromkeys(returned, node)
            returned = []
    return left


class _Lowering:
    """The state of ``lower``: what is known of the graph, and the insertions that were decided so far."""

    def __init__(self, graph: fx.Graph, traced: Traced, plan: Plan, names: Mapping[int | str, str], mode: str) -> None:
        self.graph, self.aliases, self.where = graph, Aliases(graph, traced.operations), site_nodes(graph, traced.operations)
        self.plan, self.names, self.operations = plan, names, traced.operations
        self.inputs = {str(node.target): node for node in self.graph.nodes if node.op == "placeholder"}
        self.native = {name: node for node in self.graph.nodes if (name := own_name(node))}
        self.native |= {draw_labels(node)[0].text: node for node in self.graph.nodes if is_random(node)}
        self.take_name = node_namer(node.name for node in self.graph.nodes)
        self.places: dict[tuple[Position, fx.Node], list[Insertion]] = {}
        self.present: dict[fx.Node, ValueSource] = {}  # by replaced node: what later nodes of the model read instead
        # the last input, or the last of key and clock once they are inserted; additions that act on an input are inserted after this node
        self.top: ValueSource | None = next(reversed(self.inputs.values()), None)
        self.left_at = _left_at(self.graph)
        self.key: Insertion | None = None
        self.clock: Insertion | None = None
        self.calls: dict[int, dict[str, ValueSource]] = {}  # by index of an edit on a cell's calls, then by site: the value to measure
        self.measured: dict[str, dict[str, ValueSource]] = {name: {} for name in plan.penalties}
        self.wrt: dict[str, ValueSource] = {}  # by site: the values to differentiate with respect to
        self.keeps = self._keeps()
        self.kept: dict[str, list[ValueSource]] = {}  # by name of a kept value: what to return, for a cell one value a call
        self.recomputed, self.overwritten, self.apart, self.in_whole = list[str](), list[str](), list[str](), plan.in_whole.get(mode, {})

    def _keeps(self) -> dict[str, list[KeptValue]]:
        """Return what is kept at each site of this graph, by the site's name."""
        if not self.plan.kept:
            return {}
        # A label may be of one site in train mode, and of another one in eval mode.
        labelled = {label.text: name for name, node in self.where.items() for label in labels_of(node, self.operations)}
        keeps: dict[str, list[KeptValue]] = {}
        for each in self.plan.kept:
            for name in each.names:
                if name in labelled:
                    keeps.setdefault(labelled[name], []).append(each)
        return keeps

    def edits_by_site(self) -> dict[str, list[tuple[int, Edit]]]:
        """Return the edits at each value of this graph, with their indices in the plan; tracked values come first."""
        edits: dict[str, list[tuple[int, Edit]]] = {name: [] for name in (*self.plan.tracked, *self.keeps) if name in self.where}
        for i, edit in enumerate(self.plan.edits):
            for site in edit.sites:
                if site.kind == "value" and site.name in self.where:
                    edits.setdefault(site.name, []).append((i, edit))
        return edits

    def ordered_sites(self, by_site: Mapping[str, list[tuple[int, Edit]]]) -> list[tuple[str, list[tuple[int, Edit]]]]:
        """Return the sites with their edits.

        If a splice reads the value of another site, the sites are in the order of the graph, so that this value gets its splices first.
        """
        sites = list(by_site.items())
        if any({"module_input", "previous"}.intersection(edit.regularizer.takes) for _, edits in sites for _, edit in edits):
            sites.sort(key=lambda site: self.aliases.order[self.where[site[0]]])
        return sites

    # Places for insertions

    def _add(
        self, behind: ValueSource, kind: Kind, name: str, target: str | Callable[..., Any], args: tuple[Any, ...], **more: Any
    ) -> Insertion:
        """Insert directly after ``behind``, a node or another insertion. Insertions that already follow ``behind`` then come later.

        What a vmap returns is a value of the model once the vmap is left, so the insertion stands after that.
        """
        if isinstance(behind, Insertion):
            anchor, position = behind.anchor, behind.position
        else:
            anchor, position = self.left_at.get(behind, behind), Position.AFTER
        return self._put(position, anchor, behind, kind, name, target, args, **more)

    def _add_before(
        self, anchor: fx.Node, kind: Kind, name: str, target: str | Callable[..., Any], args: tuple[Any, ...], **more: Any
    ) -> Insertion:
        """Insert directly before a node, after all insertions that stand there already."""
        there = self.places.get((Position.BEFORE, anchor))
        return self._put(Position.BEFORE, anchor, there[-1] if there else anchor, kind, name, target, args, **more)

    def _put(
        self, position: Position, anchor: fx.Node, behind: ValueSource, kind: Kind, name: str, target: str | Callable[..., Any],
        args: tuple[Any, ...], op: str = "call_module", **more: Any,
    ) -> Insertion:  # fmt: skip
        insertion = Insertion(self.take_name(name), kind, position, anchor, op, target, args, **more)
        there = self.places.setdefault((position, anchor), [])
        there.insert(there.index(behind) + 1 if isinstance(behind, Insertion) else 0, insertion)
        if insertion.replaces is not None and insertion.readers is None:
            self.present[insertion.replaces] = insertion
        return insertion

    def _order(self, value: ValueSource) -> tuple[int, int]:
        """Return a key that sorts values in the order of the emitted graph, given the insertions so far."""
        if isinstance(value, fx.Node):
            return self.aliases.order[value], 0
        there = self.places[value.position, value.anchor]
        place = there.index(value)
        # Before its anchor, a negative place; behind it, a positive one; the anchor itself has 0.
        return self.aliases.order[value.anchor], place - len(there) if value.position is Position.BEFORE else place + 1

    def ordered(self) -> tuple[Insertion, ...]:
        """Return all insertions, in the order of the emitted graph."""
        order = {position: i for i, position in enumerate(Position)}
        places = sorted(self.places, key=lambda place: (self.aliases.order[place[1]], order[place[0]]))
        return tuple(insertion for place in places for insertion in self.places[place])

    # Insertions after the inputs

    def add_key(self, sites: Iterable[Edits]) -> None:
        """Insert the node that returns the keys of the call, after the inputs, if anything draws."""
        native = [edit.dropout for edit in self.plan.native_dropout if edit.draws and edit.dropout.site.name in self.native]
        drawn = any(isinstance(edit.regularizer, Splice) or edit.name in self.plan.slices for edits in sites for _, edit in edits)
        if not native and not drawn:
            return
        # Dropout that acts in eval mode, too, needs keys in every call.
        args = (True,) if any(each.when == "always" for each in native) else ()
        self.key = self.top = self.add_at_top(Kind.KEY, args)

    def add_at_top(self, kind: Kind, args: tuple[Any, ...] = ()) -> Insertion:
        """Insert the node of the keys, or that of the clock. The clock counts calls, so it is inserted even if no node reads it."""
        if self.top is None:
            return self._add_before(next(iter(self.graph.nodes)), kind, kind.value, f"{RULES}.{kind.value}", args)
        return self._add(self.top, kind, kind.value, f"{RULES}.{kind.value}", args)

    def _clock_for(self, regularizer: Regularizer) -> dict[str, Any]:
        """Return the argument by which the runtime modules of a regularizer get its strengths, if they have a schedule."""
        return {CLOCK: self.clock} if regularizer.is_scheduled else {}

    def _inputs_of(self, name: str, regularizer: Regularizer) -> dict[str, fx.Node]:
        """Return the arguments by which the runtime modules of a regularizer get the inputs of the model that the formula takes."""
        for option, of in regularizer.model_inputs.items():
            if self.aliases.written_later(self.inputs[of], is_definite=True):
                raise TraceError(f"{name}: the model writes into its input {of!r}, which {option}= names. Clone it before that write.")
        return {option: self.inputs[of] for option, of in regularizer.model_inputs.items()}

    def _read_by(self, edit: Edit) -> dict[str, Any]:
        """Return the keyword arguments of a splice's runtime module: the clock, and the inputs of the model."""
        return self._clock_for(edit.regularizer) | self._inputs_of(edit.name, edit.regularizer)

    def _measured_by(self, edit: Edit) -> dict[str, Any]:
        """Return further arguments of ``_add`` for a measurement. Only a formula that takes the strength gets the clock."""
        read = self._read_by(edit)
        return {**_whose(edit), "kwargs": read if "weight" in edit.regularizer.takes else {n: v for n, v in read.items() if n != CLOCK}}

    # Insertions at a site

    def is_written(self, name: str, edits: Edits, title: str) -> bool:
        """Whether the model later writes into a site's value. Raises TraceError if a write or a read would bypass a replacement of it."""
        node = self.where[name]
        replacing = [*self.plan.tracked.get(name, ()), *(edit.name for _, edit in edits if isinstance(edit.regularizer, Splice))]
        if replacing and (culprit := self.aliases.written_aside(node)):
            raise TraceError(
                f"{replacing[0]} cannot replace the value {name} of {title}: {culprit.name} writes into the value's storage "
                "under another name, and a replacement would miss that write. Select a site after the write, or clone the value before it."
            )
        if replacing and (reader := self.aliases.read_past(node)):
            raise TraceError(
                f"{replacing[0]} cannot replace the value {name} of {title}: {reader.name} reads the value's storage directly, and a "
                f"replacement may have another memory layout. Select {reader.name} or a site after it."
            )
        read = self.plan.reads_replaced(name) or any(each.form == "spliced" for each in self.keeps.get(name, ()))
        return self.aliases.written_later(node, is_definite=bool(replacing) and not read)

    def add_site(self, name: str, edits: Edits, written: bool) -> None:
        """Insert what acts at a site: track node, measurements with ``clean=True``, splices, the other measurements, in this order.

        What is kept is read as by a measurement.

        If the model may write into the value later, copies are inserted too. Measurements read a copy where they would otherwise read
        the overwritten value. After a splice or track node, the model's operations read and overwrite a copy, not a result that autograd
        saved for backward.
        """
        node = self.where[name]
        # At an input, insertions stand behind the key, which stands behind all inputs.
        chain = _InsertionChain(name, node, self.top if node.op == "placeholder" and self.top is not None else node, node, node)
        spliced, tracked = any(isinstance(edit.regularizer, Splice) for _, edit in edits), name in self.plan.tracked
        # A write into storage of the caller or of the model must reach its owner.
        is_external = written and (spliced or tracked) and self.aliases.is_external(node)
        if tracked:
            track = self.names[name]
            chain.point = chain.value = self._add(chain.point, Kind.TRACK, track, f"{RULES}.{track}", (node,), site=name, replaces=node)
            self.wrt[name] = chain.value
            self.apart += [track] if written else []

        # A penalty must not measure what the model has overwritten by then.
        reads_clean = [edit.regularizer.clean for _, edit in edits if isinstance(edit.regularizer, Penalty)]
        reads_clean += [each.form == "clean" for each in self.keeps.get(name, ())]
        overwritten = self.aliases.written_later(node) if spliced else written
        copies = overwritten and any(clean or not spliced for clean in reads_clean)  # without splices, all read one value
        chain.read = self._copy(chain, Kind.COPY) if copies else chain.value
        self._measure(chain, edits, clean=True)
        self._splice(chain, edits)
        if spliced and overwritten:
            splices = [self.names[i] for i, edit in edits if isinstance(edit.regularizer, Splice)]
            self.overwritten += splices
            # A splice that does not act returns the value itself, which penalties read and the
            # model then overwrites.
            self.apart += splices[:1] if written and not is_external and reads_clean else []
        # A splice that does not act returns the value itself here, and the model's write goes into
        # it.
        if spliced and is_external and written and not all(reads_clean):
            chain.read = self._copy(chain, Kind.COPY)
        self._measure(chain, edits, clean=False)
        if written and (spliced or tracked):
            self._copy(chain, Kind.CLONE, apart_from=node if is_external else None)

    def _copy(self, chain: _InsertionChain, kind: Kind, apart_from: fx.Node | None = None) -> Insertion:
        """Insert a copy of the chain's value.

        ``apart_from``: the original value, if its storage may belong to the caller or the model. At a call in which
        the splice returns that very value, no copy is made, so that the model's write still reaches the owner of the storage.
        """
        function, args = (apart, (chain.value, apart_from)) if apart_from else (self.aliases.clone_of(chain.node), (chain.value,))
        replaces = chain.node if kind is Kind.CLONE else None
        name = f"{identifier(chain.site)}_kept"
        chain.point = copy = self._add(chain.point, kind, name, function, args, op="call_function", site=chain.site, replaces=replaces)
        return copy

    def _splice(self, chain: _InsertionChain, edits: Edits) -> None:
        splices = [(self.names[i], edit) for i, edit in edits if isinstance(edit.regularizer, Splice)]
        if splices and recomputed(chain.node, self.operations, self.present):
            self.recomputed += [name for name, _ in splices]
        for name, edit in splices:
            args, kwargs = (chain.value, self.key), self._other_values(edit, chain.node) | self._read_by(edit)
            more: dict[str, Any] = {**_whose(edit), "kwargs": kwargs, "replaces": chain.node}
            chain.point = chain.value = chain.read = self._add(chain.point, Kind.SPLICE, name, f"{RULES}.{name}", args, **more)

    def _measure(self, chain: _InsertionChain, edits: Edits, clean: bool) -> None:
        """Insert the measurements of the penalties with this ``clean``. For penalties that are computed later, note the value to read.

        Note what is kept, too.
        """
        for each in self.keeps.get(chain.site, ()):
            if (each.form == "clean") == clean:
                self.kept.setdefault(each.name, []).append(chain.read)
        for i, edit in edits:
            if not isinstance(edit.regularizer, Penalty) or edit.regularizer.clean != clean:
                continue
            if edit.steps and edit.steps.calls:  # measured after the last call
                self.calls.setdefault(i, {})[chain.site] = chain.read
                continue
            if not measures(edit.regularizer):
                self.measured[edit.name][chain.site] = chain.read
                continue
            name = self.names[i]
            chain.point = self._add(chain.point, Kind.MEASURE, name, f"{RULES}.{name}", (chain.read,), **self._measured_by(edit))
            self.measured[edit.name][chain.site] = chain.point

    def _other_values(self, edit: Edit, node: fx.Node) -> dict[str, ValueSource]:
        """Return those of the arguments ``module_input`` and ``previous`` that the splice takes, by name.

        They are the values that the site's module or cell reads, after the splices at these values.
        """
        values: dict[str, fx.Node | None] = {}
        if edit.module_input is not None:
            values["module_input"] = self.where[edit.module_input]
        if "previous" in edit.regularizer.takes:
            values["previous"] = state_before(node, self.operations)
        for value in values.values():
            if value is not None and self.aliases.written_later(value, is_definite=False):
                raise TraceError(
                    f"{edit.name} at {edit.site.name}: the model later writes into {own_name(value) or value.name}, which the splice "
                    "reads. Clone it before that write (inplace=False), or leave the site out."
                )
        return {name: self.present.get(value, value) for name, value in values.items() if value is not None}

    def add_sequence(self, i: int, edit: Edit) -> None:
        """Insert the measurement of a cell's calls, after the last call."""
        read = tuple(self.calls[i][site.name] for site in edit.sites if site.name in self.calls[i])
        last, name = max(read, key=self._order), self.names[i]
        if isinstance(last, fx.Node) and last.op == "placeholder" and self.top is not None:
            last = self.top
        more = self._measured_by(edit)
        self.measured[edit.name][edit.site.name] = self._add(last, Kind.MEASURE, name, f"{RULES}.{name}", (read,), **more)

    def kept_value(self, kept: KeptValue, end: fx.Node) -> ValueSource | None:
        """Return what to return of a kept value, for the calls of a cell after inserting their stack; None if this graph has none of it."""
        values = self.kept.get(kept.name, [])
        if not kept.calls or not values:
            return next(iter(values), None)
        steps, more = (tuple(sorted(values, key=self._order)),), {"op": "call_function", "site": kept.site.name}
        return self._add_before(end, Kind.KEEP, f"{identifier(kept.name)}_steps", torch.stack, steps, **more)

    # Tuples of which a splice replaces an item

    def add_wholes(self) -> None:
        """For each tuple of which an item was replaced, insert a tuple with the replacement, if the model reads the whole tuple later."""
        order, wholes = self.aliases.order, dict[fx.Node, Insertion]()
        for part in sorted(self.present, key=order.__getitem__):
            value, around = self.present[part], list[tuple[fx.Node, Any, frozenset[fx.Node]]]()
            item = part
            while item.target is written or returns_itself(item, self.aliases.effects):  # an item as a write has left it
                (item,) = first_argument(item)
            while is_port(item, self.operations):
                whole, index = item.args
                assert isinstance(whole, fx.Node)
                readers = frozenset(user for user in whole.users if order[user] > order[part] and not takes_apart(user))
                around.append((whole, index, readers))
                item = whole
            while around and not around[-1][2]:
                around.pop()
            for whole, index, readers in around:
                more = {"op": "call_function", "site": own_name(part), "replaces": whole, "readers": readers}
                args = (wholes.get(whole, whole), index, value)
                value = wholes[whole] = self._add(value, Kind.WHOLE, f"{whole.name}_whole", with_item, args, **more)

    # Splices on parameters

    def parameter_chains(self, reads: ParameterReads) -> list[ParameterChain]:
        """Return a chain for each parameter that splices replace in this graph."""
        by_parameter: dict[str, list[tuple[int, Edit]]] = {}
        for i, edit in enumerate(self.plan.edits):
            if edit.replaces_parameter:
                by_parameter.setdefault(edit.site.name, []).append((i, edit))
        chains = [chain_at(name, reads.get(name, ()), edits) for name, edits in by_parameter.items()]
        return [chain for chain in chains if chain is not None]

    def add_parameters(self, chains: Sequence[ParameterChain]) -> None:
        """Insert the splices on parameters: each chain before the first read of its parameter, so that the reads get the result."""
        calls = insert_chains(chains, self._add_before, self.aliases, self.names, self.key, self._read_by)
        self.places.update({(Position.INSTEAD, call.anchor): [call] for call in calls})
        self.recomputed += [self.names[i] for chain in chains for i, _ in chain.edits]

    # Insertions at the end

    def end(self) -> tuple[fx.Node, fx.Node | None]:
        """Return the node before which the last insertions stand, and the node of the output's loss, or None if it has none."""
        output = self.graph.output_node()
        end = end_of(output)
        return (output, None) if end in self.present else (end, loss_of(output))

    def add_total(self, name: str, measured: Mapping[str, ValueSource], end: fx.Node) -> Insertion:
        """Insert the node that computes a penalty from its sites, in the plan's order; at the end, unless the penalty takes derivatives."""
        if name in self.plan.slices:
            return self._add_derivative(name, measured, end)
        more = ({"of": self.in_whole[name]} if name in self.in_whole else {}) | self._clock_for(self.plan.regularizers[name])
        if isinstance(self.plan.regularizers[name], Splice):  # the penalty of a splice reads the splice's state, and no values
            return self._add_before(end, Kind.TOTAL, name, f"{RULES}.{name}", (), regularizer=name, kwargs=more)
        more |= {} if measures(self.plan.regularizers[name]) else self._inputs_of(name, self.plan.regularizers[name])
        planned = self.plan.of(name)
        there = [i for i, edit in enumerate(planned) if edit.site.kind == "parameter" or edit.site.name in measured]
        values = {(edit := planned[i]).site.name: measured.get(edit.site.name) or self._read(edit, end) for i in there}
        args = (values,) if "values" in self.plan.regularizers[name].takes else tuple(values.values())
        # The other sites are in the other mode's graph: the runtime module must know whose
        # strengths these are.
        some = 0 < len(there) < len(planned) and self.plan.regularizers[name].by_site
        more |= {"places": tuple(there)} if some else {}
        return self._add_before(end, Kind.TOTAL, name, f"{RULES}.{name}", args, regularizer=name, kwargs=more)

    def _add_derivative(self, name: str, values: Mapping[str, ValueSource], end: fx.Node) -> Insertion:
        """Insert a penalty on derivatives after the last value that it reads: its sites, the values of ``wrt``, the keys."""
        wrt = {site.name: self.wrt[site.name] for site in self.plan.slices[name].wrt if site.name in self.wrt}
        ordered = {edit.site.name: values[edit.site.name] for edit in self.plan.of(name) if edit.site.name in values}
        args, target, regularizer = (ordered, wrt, self.key), f"{RULES}.{name}", self.plan.regularizers[name]
        more: dict[str, Any] = {"regularizer": name, "kwargs": self._clock_for(regularizer) | self._inputs_of(name, regularizer)}
        # None of its sites is in this mode's graph.
        if not ordered:
            return self._add_before(end, Kind.TOTAL, name, target, args, **more)
        known = [value for value in (*ordered.values(), *wrt.values(), self.key, self.clock) if value is not None]
        return self._add(max(known, key=self._order), Kind.TOTAL, name, target, args, **more)

    def _read(self, edit: Edit, end: fx.Node) -> Insertion:
        return self._add_before(end, Kind.READ, identifier(edit.site.name), edit.site.name, (), op="get_attr", **_whose(edit))

    def replace_native_dropout(self) -> None:
        """Insert calls of runtime modules in place of native dropouts."""
        changed = set(self.present)
        for i, edit in enumerate(self.plan.native_dropout, len(self.plan.edits)):
            node, name = self.native.get(edit.dropout.site.name), self.names[i]
            if node is None:  # the node is only in the other mode's graph
                continue
            first = node.args[0] if node.args else None
            if isinstance(first, fx.Node) and first not in changed and recomputed(first, self.operations, changed):
                self.recomputed.append(name)
            kwargs = ({"noise": self.key} if edit.draws else {}) | ({CLOCK: self.clock} if edit.is_scheduled else {})
            more: dict[str, Any] = {"site": edit.dropout.site.name, "kwargs": kwargs}
            call = Insertion(node.name, Kind.NATIVE, Position.INSTEAD, node, "call_module", f"{RULES}.{name}", **more)
            self.places[Position.INSTEAD, node] = [call]
            changed.add(node)

    def attach(self, totals: Mapping[str, Insertion], end: fx.Node, loss: fx.Node | None) -> frozenset[str]:
        """Insert the node that joins the penalties to the output's loss, or, if there is none, to all values in the output.

        Return the names of the inputs on which these values depend.
        """
        outputs = [loss] if loss is not None else list(dict.fromkeys(nodes_in((end.args, end.kwargs))))
        values = tuple(self.present.get(node, node) for node in outputs)
        args = (values, tuple(totals.values()), loss is not None)
        joined = self._add_before(end, Kind.ATTACH, "attach", f"{RULES}.attach", args)
        for i, (node, value) in enumerate(zip(outputs, values, strict=True)):
            more: dict[str, Any] = {"op": "call_function", "replaces": node, "readers": frozenset((end,))}
            self._add_before(end, Kind.ATTACHED, f"{value.name}_attached", operator.getitem, (joined, i), **more)
        sources = self.aliases.sources(outputs)
        return frozenset(name for name, node in self.inputs.items() if node in sources)


def _whose(edit: Edit) -> dict[str, str]:
    return {"regularizer": edit.name, "site": edit.site.name}
