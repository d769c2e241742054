"""The symbolic front end: traces a model with torch.fx and graphreg's tracer, in both modes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx, nn

from graphreg.errors import GraphRegError, TraceError
from graphreg.ir.comparison import Literals, described_node
from graphreg.ir.metadata import is_labelled
from graphreg.ir.train_eval import ModeGraphs
from graphreg.torch_internals.bytecode import asks
from graphreg.torch_internals.fake_tensors import is_fake, make_function_table
from graphreg.tracing.global_queries import Answers, ModeReads, settle_queries
from graphreg.tracing.refusals import refusal
from graphreg.tracing.shape_decisions import DECISIONS, NeedsFunctionTable
from graphreg.tracing.side_effects.retrace import model_restored, same_graph
from graphreg.tracing.side_effects.snapshot import Snapshot
from graphreg.tracing.symbolic.holders import LEAF
from graphreg.tracing.symbolic.opaque_functions import Tried
from graphreg.tracing.symbolic.other_mode import literals_in_other_mode
from graphreg.tracing.symbolic.tracer import SiteTracer
from graphreg.tracing.train_eval_graphs import standing_in, trace_both_modes


def _take_constants(model: nn.Module, graph: fx.Graph, before: set[str], constants: dict[str, torch.Tensor]) -> None:
    """Move the tensors that a forward makes (``torch.tensor(2.0)``) from the model, where torch.fx puts them, to ``constants``."""
    for name in [n for n in model.__dict__ if n.startswith("_tensor_constant") and n not in before]:
        value, new = model.__dict__.pop(name), name
        reads = [node for node in graph.nodes if node.op == "get_attr" and node.target == name]
        if not reads:  # by an attempt that was rolled back, perhaps on fake tensors
            continue
        if is_fake(value):
            raise TypeError("it reads a tensor without values, which an earlier trace has left where no name in its code leads to")
        # the graph of the other mode may have another tensor of this name
        while new in constants and not torch.equal(constants[new], value):
            new += "_"
        constants[new] = value
        for node in reads:
            node.target = new


def symbolic(
    model: nn.Module, specialized: Mapping[str, Any], constants: dict[str, torch.Tensor], examples: Mapping[str, Any], before: Snapshot,
    watch_draws: bool, stateful: Mapping[str, str], shares: bool | None = None,
) -> tuple[ModeGraphs, dict[str, str], list[str], dict[str, bool], Mapping[fx.Graph, SiteTracer]]:
    """Trace a model with torch.fx in train mode and in eval mode.

    Args:
        model: The model.
        specialized: The specialized arguments by name.
        constants: Filled with the tensors that the forward makes.
        examples: The example inputs by argument name; may be empty.
        before: A snapshot of the model, since which nothing has changed.
        watch_draws: Whether to note which module draws random numbers, as in ``SiteTracer``.
        stateful: Submodules that are opaque, with reasons.
        shares: As in ``SiteTracer``.

    Returns:
        The graphs of both modes, the opaque modules with reasons, the arguments that were assumed
        to be tensors, the modules whose callers checkpoint them, with whether the checkpoint is
        reentrant, and the tracer of each graph.

    Raises:
        TraceError: The model cannot be traced. If a line of the user's code is the cause, the
            message names it.
        DrawsRandomly: Without ``watch_draws``, the forward drew random numbers.
    """
    asked = frozenset[str]().union(*(asks(function.__code__) for function in before.code.functions.values()))
    opaque, assumed, mode_reads = dict(stateful), dict[str, None](), ModeReads()
    checkpoints, tracers, tried = dict[str, bool](), dict[fx.Graph, SiteTracer](), Tried()

    def trace_with(into: dict[str, torch.Tensor], answers: Answers) -> tuple[fx.Graph, SiteTracer]:
        return _traced(model, into, lambda: SiteTracer(opaque, dict(specialized), examples, answers, watch_draws, shares, asked, tried))

    def once() -> fx.Graph:
        graph, tracer = trace_with(constants, {})
        tracers[graph] = tracer
        tried.error = None  # the functions that are opaque have helped
        opaque.update(tracer.opaque)
        assumed.update(tracer.assumed_tensors)
        checkpoints.update(tracer.checkpoints)
        mode_reads.add(tracer.environment.mode_reads)

        def same(answers: Answers) -> bool:
            with model_restored(model):
                return same_graph(graph, lambda: trace_with(dict(constants), answers)[0])

        settle_queries(model, graph, tracer.environment.queries, same, opaque, mode_reads)
        return graph

    def follow(graph: fx.Graph) -> dict[str, Literals] | None:
        return literals_in_other_mode(model, graph, tracers[graph], before)

    try:
        # this also fills ``opaque`` and ``assumed``
        failed = list[Exception]()
        graphs = trace_both_modes(model, once, opaque, mode_reads, False, before, follow, failed)
        if failed:
            why = str(failed[0]) if isinstance(failed[0], GraphRegError) else refusal(model, tried.error or failed[0], bool(examples))
            graphs = {**graphs, "eval": standing_in(graphs["train"], why)}
        return graphs, opaque, list(assumed), checkpoints, tracers
    except GraphRegError:
        raise
    except Exception as error:
        first = tried.error or error  # what the others say follows from functions that were opaque in vain
        raise TraceError(refusal(model, first, bool(examples))) from first


def same_apart_from_sharing(apart: ModeGraphs, shared: ModeGraphs) -> bool:
    """Return whether a trace in which each argument has a proxy of its own computes the same as one in which the same tensors have one."""
    return apart.keys() == shared.keys() and all(_described(graph) == _described(shared[mode]) for mode, graph in apart.items())


def _described(graph: fx.Graph) -> list[str]:
    """Return a text for each node, with the number of the node for its name, and that of the tensor for a node that stands for an input.

    Assertions are left out, as are the nodes that only assertions read: each of two proxies of one
    tensor has assertions of its own.
    """
    left_out: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        unread = not is_labelled(node) and node.users and all(user in left_out for user in node.users)
        if node.target in DECISIONS or unread:
            left_out.add(node)
    kept = [node for node in graph.nodes if node not in left_out and LEAF not in node.meta]
    names = {node: f"input {node.meta.get(LEAF)}" for node in graph.nodes} | {node: str(i) for i, node in enumerate(kept)}
    return [described_node(node, names) for node in kept]


def _traced(
    model: nn.Module, constants: dict[str, torch.Tensor], new_tracer: Callable[[], SiteTracer]
) -> tuple[fx.Graph, SiteTracer]:  # fmt: skip
    """Trace a model in its present mode, and move the tensors that the forward makes to ``constants``. Return the tracer, too."""
    before = set(model.__dict__)
    tracer = new_tracer()
    try:
        try:
            graph = tracer.trace(model)
        except (Exception, NeedsFunctionTable):
            if not tracer.needs_table:
                raise
        # Most models need no fake tensors, so the table, which takes seconds, is made for others only.
        if tracer.needs_table:
            make_function_table()
            tracer = new_tracer()
            graph = tracer.trace(model)
    finally:
        tracer.ended = True
    _take_constants(model, graph, before, constants)
    return graph, tracer
