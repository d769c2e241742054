"""Labels, plans, rewrites and compiles one captured graph; ``Subgraph`` is the result, ready to run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from graphreg.dynamo_backend.capture import Capture, Captured, Known
from graphreg.dynamo_backend.capture_place import Place
from graphreg.dynamo_backend.emit import Emitted, acting, constant_example, emit
from graphreg.dynamo_backend.model_call import Call, parameter_of
from graphreg.dynamo_backend.wrappers import module_itself
from graphreg.errors import GraphRegError
from graphreg.ir.local_shards import measured_shard
from graphreg.ir.metadata import Kind, addition_of, own_labels, scope_of
from graphreg.ir.module_record import RULES
from graphreg.ir.roles import BOUNDARY, deep_nodes, value_sites
from graphreg.planning.model_inputs import check_model_inputs
from graphreg.planning.native_dropout import OwnDropout, decide
from graphreg.planning.plan import Edit, Plan, plan_quietly
from graphreg.regularizer.base import Regularizer, Splice
from graphreg.rewriting.rewrite import rewrite
from graphreg.rng.operators import within_backend
from graphreg.runtime.noise_keys import KeyRule
from graphreg.runtime.rank_layout import lead
from graphreg.runtime.rewritten_module import RewrittenModule
from graphreg.runtime.runtime_module import DrawingRule, Rules
from graphreg.runtime.sharding import shard_measured
from graphreg.session.hosts import graphs_of
from graphreg.session.session import Session
from graphreg.session.streams import CountedStream, StreamName
from graphreg.torch_internals.distributed import is_distributed
from graphreg.torch_internals.inductor import without_autograd_cache
from graphreg.torch_internals.modules import buffers_by_name, parameters_by_name
from graphreg.tracing.trace import Traced

Inner = Callable[[fx.GraphModule, list[Any]], Callable[..., Any]]


ParameterMetadata = tuple[Any, ...]


def parameter_metadata(parameter: Tensor) -> ParameterMetadata:
    """Return what a compiled graph assumes of a parameter that is an input. Dynamo guards on the same for the parameters that it sees."""
    return parameter.shape, parameter.dtype, parameter.device, parameter.requires_grad


@dataclass(frozen=True)
class Subgraph:
    """A subgraph of the model: one graph that Dynamo captured, with its plan and its compiled form.

    Attributes:
        number: Its number, from 1, in the order of capture.
        place: The code that it was captured from.
        broken: Whether it ends at a graph break.
        traced: The captured graph as a ``Traced``, which ``plan`` and ``rewrite`` take.
        plan: The edits in the graph.
        claimed: The site names that the graph uses. Later graphs of the call must not give them to other values.
        gives: What is known of the graph's outputs, by position.
        rows: The noise streams of the graph, in the order of the keys.
        draws: For each stream, whether it draws in the modes in which the graph was captured.
        emitted: The graph that was compiled; None if nothing acts in it.
        run: The compiled graph.
        device: The device of the keys and strengths.
        places: By regularizer, the sites that have an element in the tensor of its strengths.
        owners: The modules whose modes decide whether the graph's draws act.
        modes: The ``training`` flags of ``owners`` when the graph was captured.
        extra: What the compiled graph assumes of each parameter that only a penalty reads, and not the captured graph.
    """

    number: int
    place: Place
    broken: bool
    traced: Traced
    plan: Plan
    claimed: tuple[str, ...]
    gives: Mapping[int, Known]
    rows: tuple[CountedStream, ...] = ()
    draws: tuple[bool, ...] = ()
    emitted: Emitted | None = None
    run: Callable[..., Any] = field(default=lambda *inputs: inputs, repr=False)
    device: torch.device | None = None
    places: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    owners: tuple[nn.Module, ...] = ()
    modes: tuple[bool, ...] = ()
    extra: tuple[ParameterMetadata, ...] = ()

    @property
    def measured(self) -> tuple[tuple[str, str], ...]:
        """For each measurement that the compiled graph returns, the name of the penalty that made it, and the site."""
        return self.emitted.measured if self.emitted else ()

    @property
    def weighed(self) -> tuple[str, ...]:
        """The names of the penalties on parameters that the compiled graph computes."""
        return self.emitted.weighed if self.emitted else ()

    def parameters(self, model: nn.Module) -> tuple[list[Tensor], bool]:
        """Return the parameters that only a penalty reads, and whether the compiled graph still fits them.

        Dynamo does not notice if one of them was frozen or moved since the capture. Then zeros are returned instead of the parameters, and
        the caller must not use the totals that the graph computes for penalties on parameters.
        """
        present = [parameter_of(model, name) for name in self.emitted.more] if self.emitted else []
        if tuple(map(parameter_metadata, present)) == self.extra:
            return list(present), True
        return [torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device, _ in self.extra], False


class Maker:
    """Makes the subgraphs of one model. ``regularizers``: all except penalties on parameters, by their final names."""

    def __init__(
        self, model: nn.Module, regularizers: Mapping[str, Regularizer], own_dropout: OwnDropout, inner: Inner, title: str
    ) -> None:
        self.model, self.inner, self.own_dropout, self.title = model, inner, own_dropout, title
        self.regularizers = [dataclasses.replace(r, name=name, expect=None) for name, r in regularizers.items()]

    def paths(self) -> dict[int, str]:
        """Return the paths of the model's modules by id; for a module with several paths, the first."""
        paths: dict[int, str] = {}
        for path, module in self.model.named_modules(remove_duplicate=False):
            paths.setdefault(id(module_itself(module)), path)
        return paths

    def capture(self, gm: fx.GraphModule, inputs: Sequence[Any], place: Place, call: Call) -> tuple[Captured, Traced]:
        """Label the captured graph. Return it as a ``Captured`` and as a ``Traced``, which ``plan`` and ``rewrite`` take."""
        tensors: dict[int, str] = {}
        for name, tensor in (*parameters_by_name(self.model).items(), *buffers_by_name(self.model).items()):
            # A tied parameter has several names, and is read by its first.
            tensors.setdefault(id(tensor), name)
        captured = Capture(gm, self.model, place, self.paths(), tensors).captured(inputs, call.known(inputs), call.names)
        graphs = {"both": captured.graph}
        return captured, Named(self.model, graphs, value_sites(self.model, graphs), front_end="dynamo", constants=captured.constants,
                               model_title=self.title)  # fmt: skip

    def planned(self, traced: Traced, captured: Captured, call: Call) -> Plan:
        """Plan the edits in this graph. A value that another graph computed gets only the edits that have not yet acted on it."""
        full = plan_quietly(traced, self.regularizers, "ignore")
        native, _ = decide(self.own_dropout, [each for each in traced.native_dropout if not each.why_not], traced.title, "ignore")
        new = [e for e in full.edits if e.site.name not in captured.at_boundary or (e.name, e.site.name) not in call.acted]
        for edit in new:
            check_model_inputs(traced, edit.regularizer, {edit.site: (edit.matched, edit.steps)})
        return dataclasses.replace(full, edits=tuple(_after(edit, captured, call) for edit in new), native_dropout=native)

    def made(
        self, number: int, gm: fx.GraphModule, inputs: Sequence[Any], place: Place, call: Call, session: Session
    ) -> Subgraph:
        """Capture, plan, rewrite and compile a graph."""
        captured, traced = self.capture(gm, inputs, place, call)
        plan = self.planned(traced, captured, call)
        call.strengths.learn((edit.name, edit.site) for edit in plan.edits)
        broken = not place.last and bool(getattr(getattr(gm, "compile_subgraph_reason", None), "graph_break", True))
        subgraph = Subgraph(number, place, broken, traced, plan, captured.claimed, _gives(traced))
        weighed = call.weighs()
        # Nothing acts here: the inner compiler gets the graph that Dynamo captured.
        if not plan.edits and not plan.native_dropout and not weighed:
            return dataclasses.replace(subgraph, run=self.inner(gm, list(inputs)))

        # The seed is of no matter: the graph gets its keys as an input.
        rewritten = rewrite(traced, plan, rng=0)
        if (found := measured_shard(graphs_of(rewritten)["both"], _returns_shard)) is not None:
            raise GraphRegError(shard_measured(*found))
        rules: Rules = getattr(rewritten, RULES)
        drawing = [module for module in rules.children() if isinstance(module, DrawingRule)]
        for module in drawing:  # penalties stay on: ``Call`` switches them off, so that a graph is the same in a block of penalties_off
            module.forced, module.silenced = session.noise.state is True, session.noise.state is False

        # An input for each regularizer: its strengths, one for each of its sites in this graph.
        places = {name: tuple(sites) for name, sites in rules.planned_strengths.items()}
        places |= {name: call.measurers[name].sites for name in weighed}
        emitted = emit(rewritten, gm, plan, weighed)
        # The inner compiler sees examples of the added inputs, with the sizes that they have at
        # each call.
        device = next((v.device for v in inputs if isinstance(v, Tensor) and v.is_floating_point()), torch.device("cpu"))
        rows = _rows(rewritten, plan)
        more = [constant_example(torch.zeros(len(rows), 2, dtype=torch.int32, device=device))] if emitted.draws else []
        more += [constant_example(call.strengths.tensor(name, places[name], device)) for name in emitted.strengths]
        extra = [parameter_of(self.model, name) for name in emitted.more]
        more += map(constant_example, extra)
        draws = tuple(acts for _, acts in acting(rewritten))
        with within_backend(), without_autograd_cache():  # the cache key lacks the runtime modules
            run = self.inner(emitted.module, [*inputs, *more])
        owners: tuple[Any, ...] = tuple(dict.fromkeys(module.owner[0] for module in drawing))
        # The rewritten module is thrown away; the mode that its root had is the model's.
        owners = tuple(self.model if isinstance(owner, RewrittenModule) else owner for owner in owners)
        modes = tuple(owner.training for owner in owners)
        return dataclasses.replace(subgraph, rows=rows, draws=draws, emitted=emitted, run=run, device=device, owners=owners, modes=modes,
                                   places=places, extra=tuple(map(parameter_metadata, extra)))  # fmt: skip


def _after(edit: Edit, captured: Captured, call: Call) -> Edit:
    """Return the edit with the ``occurrence`` that it has in the call.

    If another graph computed the value, the edits that have acted on it there with a regularizer of the same class count, too.
    """
    if edit.site.name not in captured.at_boundary:
        return edit
    return dataclasses.replace(edit, occurrence=edit.occurrence + call.occurrences[edit.site.name, type(edit.regularizer)])


@dataclass(frozen=True)
class Named(Traced):
    """A ``Traced`` of one subgraph, whose ``title`` is that of the whole model, or the name of the compiled function."""

    model_title: str = ""

    @property
    def whole(self) -> bool:
        return False

    @property
    def title(self) -> str:
        return self.model_title


def _gives(traced: Traced) -> dict[int, Known]:
    """Return what is known of the outputs, by position, for later graphs of the call; empty if the model returns these outputs."""
    graph = traced.graphs["both"]
    end = graph.output_node()
    if BOUNDARY not in end.meta:
        return {}
    deep, values = deep_nodes(graph, traced.operations, traced.model), dict(enumerate(end.args[0]))  # type: ignore[arg-type]
    return {i: Known(scope_of(v), own_labels(v), v in deep) for i, v in values.items() if isinstance(v, fx.Node)}


def _returns_shard(node: fx.Node) -> bool | None:
    """Return whether a node returns a plain tensor of which each rank has a part; None if it computes one from one."""
    if is_distributed(node.meta.get("example_value")):
        return False
    if getattr(node.target, "__name__", node.target) not in ("to_local", "prim_to_local"):  # the second up to torch 2.11
        return None
    given: Any = node.args[0]
    return any(not placement.is_replicate() for placement in given.meta["example_value"].placements)


def _rows(rewritten: RewrittenModule, plan: Plan) -> tuple[CountedStream, ...]:
    """Return the noise stream of each row of the keys."""
    rules: Rules = getattr(rewritten, RULES)
    key = rules._modules.get("key")
    if not isinstance(key, KeyRule):
        return ()
    key.alike = True  # the keys that the graph gets are those of this rank, or of the first of the ranks that share a DTensor
    shared = _shared_by(rewritten)
    streams = [
        CountedStream(
            StreamName(e.site.name, type(e.regularizer).__name__, e.occurrence), e.regularizer.rng, e.replaces_parameter,
            shared.get(e.site.name),
        )
        for e in plan.edits
        if isinstance(e.regularizer, Splice)
    ] + [CountedStream(StreamName(e.dropout.site.name, "own dropout", 0)) for e in plan.native_dropout if e.draws]  # fmt: skip
    if len(streams) != len(key.names):
        raise GraphRegError(
            "graphreg's backend and its rewrite disagree about the number of noise streams. This is a fault of graphreg; report it."
        )
    return tuple(streams)


def _shared_by(rewritten: RewrittenModule) -> dict[str, int]:
    """Return, for each splice on a DTensor, by the name of its site: the first of the ranks that share the value."""
    found = {}
    for graph in graphs_of(rewritten).values():
        for node in graph.nodes:
            addition = addition_of(node)
            if addition is not None and addition.kind is Kind.SPLICE and addition.site is not None:
                value = node.all_input_nodes[0].meta.get("example_value")
                if is_distributed(value):
                    found[addition.site] = lead(value.device_mesh)
    return found
