"""Gives the values and parameters of a traced stage the names that they have in the whole model."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import fx

from graphreg.errors import RegularizerError, suggestions_text
from graphreg.ir.metadata import calls_of, label_site, own_labels, own_name, record_calls, scope_of
from graphreg.ir.roles import BOUNDARY, labels_of, value_sites
from graphreg.stages.counterparts import Found, counterparts, read_in_whole
from graphreg.stages.paths import Paths, tensor_names
from graphreg.torch_internals.modules import parameters_by_name
from graphreg.tracing.trace import Traced

WholeNames = Mapping[str, str | None]  # names in a stage -> names in the whole model; None for a value that the whole model does not have


@dataclass(frozen=True)
class StageTrace:
    """A traced stage in which everything has its name in the whole model.

    Attributes:
        traced: The trace. What the stage gets from other stages has the name that it has in the whole model.
        received: The names of the values that the stage gets from other stages.
        first_reads: For each parameter, by its name in ``traced``: whether the stage has the first of all reads of it in the whole model;
            None if this is not certain.
        uncertain: For each value of the stage that may be one of several values of the whole model, by its name in the stage: the names
            of the several values.
        strange: The values of the stage that the whole model does not have, by their names in the stage, each with its operation.
        opaque: The paths of the modules that the stage calls as one operation, and into which the trace of the whole model sees.
    """

    traced: Traced
    received: frozenset[str]
    first_reads: Mapping[str, bool | None]
    uncertain: Mapping[str, tuple[str, ...]]
    strange: Mapping[str, str]
    opaque: tuple[str, ...]


def named_as_in_whole(stage: Traced, whole: Traced, names: WholeNames) -> StageTrace:
    """Name the values and parameters of a stage as in the whole model. The labels of the nodes of ``stage`` are changed.

    Raises:
        RegularizerError: A name in ``names`` is unknown, or the stage has a parameter that the whole model does not have.
    """
    graphs = dict(stage.graphs)
    if len(whole.graphs) > len(graphs):  # the whole model has a graph for each mode, and a value may have another number in each
        graphs = {mode: graph if i == 0 else copy.deepcopy(graph) for i, mode in enumerate(whole.graphs) for graph in graphs.values()}
    given, values = _told_apart(stage, whole, names)
    paths = Paths.of(stage.model, whole.model, given)
    _require_parts(stage, whole, paths)
    found = _Names(stage, whole, paths, values)
    for mode, graph in graphs.items():
        found.give(graph, whole.graphs.get(mode) or next(iter(whole.graphs.values())))
    found.tell_apart()
    root = paths.root()
    opaque = {paths(path): reason for path, reason in stage.opaque_modules.items()}
    traced = replace(stage, model=root, graphs=graphs, values=value_sites(root, graphs), opaque_modules=opaque)
    reads = found.first_reads(traced)
    return StageTrace(traced, frozenset(found.received), reads, found.uncertain, found.strange, tuple(found.opaque))


def _told_apart(stage: Traced, whole: Traced, names: WholeNames) -> tuple[dict[str, str], WholeNames]:
    """Split ``names`` into the entries for modules and tensors, and the entries for values."""
    ours, theirs = ({*each.operations.modules, *tensor_names(each.model)} for each in (stage, whole))
    our_values, their_values = ({own_name(n) for graph in each.graphs.values() for n in graph.nodes} - {""} for each in (stage, whole))
    for name, other in names.items():
        if name not in ours | our_values:
            near = suggestions_text(name, sorted(ours | our_values))
            raise RegularizerError(f"names={{{name!r}: ...}}: the stage has no module, parameter or value {name!r}.{near}")
        if other is None and name not in our_values:
            raise RegularizerError(f"names={{{name!r}: None}} is for a value that the whole model does not have, and {name!r} is none.")
        if other is not None and not (name in ours and other in theirs) and not (name in our_values and other in their_values):
            near = suggestions_text(other, sorted(theirs | their_values))
            raise RegularizerError(f"names={{{name!r}: {other!r}}}: {whole.title} has nothing like it that is called {other!r}.{near}")
    paths = {name: other for name, other in names.items() if other is not None and name in ours and other in theirs}
    return paths, {name: other for name, other in names.items() if name not in paths}


def _require_parts(stage: Traced, whole: Traced, paths: Paths) -> None:
    """Raise RegularizerError unless the parameters of the stage are parameters of the whole model."""
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters_by_name(whole.model).items()}
    for name, parameter in parameters_by_name(stage.model).items():
        theirs, shape = paths(name), tuple(parameter.shape)
        if theirs not in shapes:
            raise RegularizerError(
                f"the stage has a parameter {theirs!r}, and {whole.title} has none of that name.{suggestions_text(theirs, shapes)} Build "
                "the stage from the modules of the whole model under their own names, as by a copy from which the other layers are "
                f"deleted; or say what the names are, with names={{'0': 'layers.4'}} for a module '0' that is 'layers.4' in {whole.title}."
            )
        if shape != shapes[theirs]:
            raise RegularizerError(
                f"the parameter {theirs!r} has the shape {shape} in the stage, and {shapes[theirs]} in {whole.title}. "
                "whole= must be the model that the stage is a part of; regularize before you shard."
            )


class _Names:
    """Labels the graphs of a stage. ``names``: the values whose names the user has given."""

    def __init__(self, stage: Traced, whole: Traced, paths: Paths, names: WholeNames) -> None:
        self.stage, self.whole, self.paths, self.names = stage, whole, paths, names
        self.constants = {*stage.constants, *whole.constants}
        self.values = {site.name: site for site in stage.values}
        self.made = set[str]()
        self.received = dict[str, list[fx.Node]]()
        self.nodes = set[fx.Node]()  # those of the whole model that the stage has
        self.known = set[fx.Node]()  # those of the stage with a certain counterpart
        self.uncertain = dict[str, tuple[str, ...]]()
        self.strange = dict[str, str]()
        self.opaque: dict[str, None] = {}

    def give(self, graph: fx.Graph, whole: fx.Graph) -> None:
        """Label the nodes of one graph of the stage, given the graph of the whole model for the same mode."""
        by_name = {own_name(node): node for node in whole.nodes}
        chosen: dict[fx.Node, fx.Node | None] = {}
        for node in graph.nodes:
            if node.op != "placeholder" and (ours := own_name(node)) in self.names:
                chosen[node] = by_name.get(self.names[ours] or "")
        found = counterparts(graph, whole, self.paths, self.constants, chosen)
        inside: dict[str, list[fx.Node]] = {}
        for node in whole.nodes:
            for path, _ in calls_of(node) or ():
                inside.setdefault(path, []).append(node)
        taken = set[str]()
        for node in graph.nodes:
            record_calls(node, None if (calls := calls_of(node)) is None else tuple((self.paths(path), n) for path, n in calls))
            if node.op == "placeholder":
                self._label_input(node, read_in_whole(found, node), taken)
            elif node.op != "output":
                self._label(node, found, inside)
        for node in graph.nodes:
            # After the search for counterparts, which goes by the stage's own paths.
            if node.op in ("call_module", "get_attr") and node.target not in self.constants:
                node.target = self.paths(str(node.target))

    def _label_input(self, node: fx.Node, read: list[fx.Node], taken: set[str]) -> None:
        """Label an input of the stage: an input of the whole model, or a value of another stage, if it is certain which."""
        inputs = [each for each in read if each.op == "placeholder"]
        between = [each for each in read if each.op != "placeholder"]  # a stage may read the shape of one input from another
        source = between[0] if len(between) == 1 else inputs[0] if len(inputs) == 1 and not between else None
        label_site(node, "")
        # What another stage computed is no input of the model, at which regularizers of inputs act.
        if source is None or source.op != "placeholder":
            node.meta[BOUNDARY] = True
        labels = labels_of(source, self.whole.operations)[:1] if source is not None else ()
        # Two inputs of the stage may have one value, and one name is for one site.
        if source is None or not labels or labels[0].text in taken:
            return
        taken.add(labels[0].text)
        if source.op == "placeholder":
            self.nodes.add(source)
            label_site(node, "", *own_labels(source))
        else:
            self.received.setdefault(labels[0].text, []).append(node)
            label_site(node, "", replace(labels[0], op="input", module=None))

    def _label(self, node: fx.Node, found: Found, inside: Mapping[str, Sequence[fx.Node]]) -> None:
        """Label a node that is no input. ``inside``: for the path of each module, the nodes of the whole model that its calls made."""
        ours, labels, theirs = own_name(node), own_labels(node), found[node]
        label_site(node, self.paths(scope_of(node)))
        if len(theirs) == 1:
            self.nodes.add(theirs[0])
            self.known.add(node)
            label_site(node, self.paths(scope_of(node)), *own_labels(theirs[0]))
            self.made.update(label.text for label in labels_of(theirs[0], self.whole.operations))
        elif theirs:
            self.uncertain[ours] = tuple(own_name(each) for each in theirs)
        # The whole model's trace has the operations of this module, and the stage's calls it as
        # one.
        elif node.op == "call_module" and (path := self.paths(str(node.target))) in inside:
            self.opaque[path] = None
            if len({n for each in inside[path] for outer, n in calls_of(each) or () if outer == path}) == 1:  # the only call
                self.nodes.update(inside[path])
        elif labels and self._matters(node, ours):
            self.strange[ours] = labels[0].op

    def tell_apart(self) -> None:
        """Remove the name of a value that the stage gets as an input in one mode, if it computes that value itself in the other mode."""
        for name in self.made.intersection(self.received):
            for node in self.received.pop(name):
                label_site(node, "")

    def _matters(self, node: fx.Node, name: str) -> bool:
        """Whether a value that the whole model does not have could be one that a regularizer should act on."""
        site = self.values.get(name)
        known = name in self.names and self.names[name] is None
        return site is not None and site.selectable and not known and not self.stage.operations.passes_through(node)

    def first_reads(self, traced: Traced) -> dict[str, bool | None]:
        """Return, for each parameter of ``traced`` by name, whether the stage is the first of all stages to read it; None if not certain.

        A parameter that the whole model never reads belongs to every stage that has it.
        """
        owner = {label.name: site.name for site in self.whole.parameters for label in site.labels}
        in_whole, here = _reads(self.whole), _reads(traced)
        return {site.name: self._is_first(in_whole.get(owner[site.name], []), here.get(site.name, [])) for site in traced.parameters}

    def _is_first(self, in_whole: list[fx.Node], here: list[fx.Node]) -> bool | None:
        """Return whether the first of the whole model's reads of a parameter is in the stage, which has the reads ``here``."""
        if not in_whole or in_whole[0] in self.nodes:
            return True
        # Each read of the stage is known in the whole model, and the first read there is none of
        # them.
        if self.known.issuperset(here):
            return False
        # With one read in the whole model, that of the stage must be it, whatever it is called.
        return True if len(set(in_whole)) == 1 else None


def _reads(traced: Traced) -> dict[str, list[fx.Node]]:
    """Return the nodes that read each parameter, in the first graph that has such a node."""
    reads: dict[str, list[fx.Node]] = {}
    for by_name in traced.parameter_reads.values():
        for name, each in by_name.items():
            reads.setdefault(name, [read.node for read in each])
    return reads
