"""The symbolic front end: torch.fx's trace with graphreg's tracer, in both modes."""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import fx, nn

from graphreg.errors import GraphRegError, TraceError
from graphreg.ir import LIBRARY_FOLDERS, Graphs
from graphreg.torch_internals import make_function_table
from graphreg.tracing.context import Answers, Asked, settled
from graphreg.tracing.modes import trace_keeping
from graphreg.tracing.shape_decisions import Unprepared
from graphreg.tracing.side_effects.retrace import left_as_it_was, same_graph
from graphreg.tracing.symbolic.tracer import SiteTracer


def _take_constants(model: nn.Module, graph: fx.Graph, before: set[str], constants: dict[str, torch.Tensor]) -> None:
    """fx puts the tensors that a forward makes (``torch.tensor(2.0)``) on the model; they are the graph's, not the model's."""
    for name in [n for n in model.__dict__ if n.startswith("_tensor_constant") and n not in before]:
        value, new = model.__dict__.pop(name), name
        while new in constants and not torch.equal(constants[new], value):
            new += "_"
        constants[new] = value
        for node in graph.nodes:
            if node.op == "get_attr" and node.target == name:
                node.target = new


def symbolic(
    model: nn.Module, held: Mapping[str, Any], constants: dict[str, torch.Tensor], examples: Mapping[str, Any]
) -> tuple[Graphs, dict[str, str], list[str]]:
    """The graphs of both modes, the submodules kept whole with the reason, and the arguments that were taken for tensors, for the
    forward asks; ``constants`` takes the tensors that a forward makes.

    Raises TraceError with the line of the user's code that cannot be traced.
    """
    leaves, assumed, modes = dict[str, str](), dict[str, None](), Asked()

    def traced(into: dict[str, torch.Tensor], answers: Answers) -> tuple[fx.Graph, SiteTracer]:
        before = set(model.__dict__)
        tracer, graph = SiteTracer(leaves, dict(held), examples, answers), None
        with suppress(Unprepared):
            graph = tracer.trace(model)
        if graph is None:
            make_function_table()
            tracer = SiteTracer(leaves, dict(held), examples, answers)
            graph = tracer.trace(model)
        _take_constants(model, graph, before, into)
        return graph, tracer

    def once() -> fx.Graph:
        graph, tracer = traced(constants, {})
        leaves.update(tracer.leaves)
        assumed.update(tracer.assumed)
        modes.update(tracer.questions.modes)

        def same(answers: Answers) -> bool:
            with left_as_it_was(model):
                return same_graph(graph, lambda: traced(dict(constants), answers)[0])

        settled(graph, tracer.questions.asked, same, leaves)
        return graph

    try:
        return trace_keeping(model, once, leaves, modes, run=False), leaves, list(assumed)  # in this order: the trace fills both
    except GraphRegError:
        raise
    except Exception as error:
        raise TraceError(_refusal(model, error, bool(examples))) from error


def where(error: BaseException) -> str:
    """The line of the user's code that an error came from, as ``" at file:line: code"``."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith((*LIBRARY_FOLDERS, "<"))]
    return f" at {frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line}" if frames else ""


def _refusal(model: nn.Module, error: Exception, examples: bool) -> str:
    if isinstance(error, RecursionError):
        return (
            f"{type(model).__name__} cannot be traced symbolically{where(error)}: Python's limit of nested calls was reached, which "
            "graphreg raises as far as modules stand within one another. The model nests more calls than that, or, where it has no values "
            "to decide by, calls itself without end. Raise the limit (sys.setrecursionlimit) if the depth is meant."
        )
    return (
        f"{type(model).__name__} cannot be traced symbolically{where(error)} ({str(error).strip() or type(error).__name__}). "
        "Move that step into a submodule of its own (graphreg keeps a submodule it cannot trace whole), mark a helper "
        "function with torch.fx.wrap, or take the decision from a constant rather than from a tensor."
        + ("" if examples else " Where it is taken from a shape, give example_inputs: it then follows theirs, and the graph asserts so.")
    )
