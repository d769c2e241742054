"""The front door of tracing: a model goes in, graphs and sites come out, the model stays as it was."""

from __future__ import annotations

import inspect
import os
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from torch import fx, nn

from graphreg.collector import collector_at_rest
from graphreg.decisions import Unprepared, decisions, prepare
from graphreg.errors import GraphRegError, TraceError
from graphreg.given import given_graphs
from graphreg.modes import Graphs, left_as_it_was, trace_modes
from graphreg.operators import Operations
from graphreg.own_dropout import Own, find
from graphreg.roles import value_sites
from graphreg.shapes import Arguments, arguments, propagate
from graphreg.sites import Label, Names, Site
from graphreg.surroundings import randomness, restore_randomness
from graphreg.tracer import SiteTracer

FrontEnd = Literal["auto", "symbolic"]
FRONT_ENDS = ("auto", "symbolic")


@dataclass(frozen=True)
class Traced:
    """A traced model: its graphs by mode (``both``, or ``train`` and ``eval``) and its sites.

    ``leaves`` are the submodules kept whole, with the reason; ``held`` the arguments fixed at their value.
    """

    model: nn.Module
    graphs: Graphs
    values: tuple[Site, ...]
    leaves: Mapping[str, str] = field(default_factory=dict)
    held: Mapping[str, Any] = field(default_factory=dict)
    front_end: str = "symbolic"
    constants: Mapping[str, torch.Tensor] = field(default_factory=dict)

    @cached_property
    def parameters(self) -> tuple[Site, ...]:
        """The parameters as sites, named by ``named_parameters()``: each once, tied or not."""
        modules = self.operations.modules
        return tuple(parameter_site(modules, name, p) for name, p in self.model.named_parameters())

    @property
    def sites(self) -> tuple[Site, ...]:
        return (*self.values, *self.parameters)

    @property
    def whole(self) -> bool:
        """Whether the graphs are the model's whole forward, and not a part of it."""
        return True

    @property
    def title(self) -> str:
        return type(self.model).__name__.removesuffix("Impl")

    @cached_property
    def own_dropout(self) -> tuple[Own, ...]:
        """The model's own dropouts, and what else of it draws."""
        return find(self.graphs, self.operations, self.leaves)

    @cached_property
    def operations(self) -> Operations:
        return Operations(self.model)


def parameter_site(modules: Mapping[str, nn.Module], name: str, parameter: nn.Parameter) -> Site:
    owner = name.rpartition(".")[0]
    label = Label(name, type(modules[owner]).__name__)
    if nn.parameter.is_lazy(parameter):
        return Site((label,), "parameter", module=owner, selectable=False, why_not="not initialized yet")
    return Site((label,), "parameter", module=owner, shape=tuple(parameter.shape), dtype=parameter.dtype)


@collector_at_rest()
def trace(model: nn.Module, example_inputs: Any = None, front_end: FrontEnd = "auto") -> Traced:
    """Trace a model in both of its modes.

    ``example_inputs``: a tensor, a tuple (positional) or a dict (keyword); with them the sites know shapes and dtypes.
    Optional arguments that the example does not carry are held at their defaults.
    Raises TraceError with the line of the user's forward that cannot be traced.
    """
    drawn = randomness()
    try:
        return _trace(model, example_inputs, front_end)
    finally:
        restore_randomness(drawn)  # the model's code may have drawn; the user's streams go on as if it had not


def _trace(model: nn.Module, example_inputs: Any, front_end: FrontEnd) -> Traced:
    check_model(model)
    if front_end not in FRONT_ENDS:
        raise GraphRegError(f"front_end={front_end!r} is unknown; it is one of {', '.join(map(repr, FRONT_ENDS))}.")
    call = arguments(example_inputs)
    bound = bind(model, call)
    held = _held(model, bound if call else None)
    constants: dict[str, torch.Tensor] = {}
    if isinstance(model, fx.GraphModule):
        graphs, leaves = given_graphs(model), dict[str, str]()
    else:
        with left_as_it_was(model):
            graphs, leaves = _symbolic(model, held, constants, bound)
    if call:
        propagate(model, graphs, bound, call, constants)
    return Traced(model, graphs, value_sites(model, graphs), leaves, held, constants=constants)


def names(model: nn.Module, example_inputs: Any = None) -> Names:
    """Every site of a model: name, op, shape, dtype, role. Prints as a table, iterates over names."""
    traced = trace(model, example_inputs)
    notes = [f"kept whole: {path} ({reason})" for path, reason in traced.leaves.items()]
    notes += [f"held: {name}={value!r} (give example_inputs that carry it to trace it)" for name, value in traced.held.items()]
    notes += decisions(next(iter(traced.graphs.values())))
    notes += [f"own dropout: {own.text}" for own in traced.own_dropout]
    return Names(traced.title, traced.sites, notes)


def bind(model: nn.Module, call: Arguments | None) -> dict[str, Any]:
    """The example inputs by argument name."""
    if call is None:
        return {}
    try:
        bound = inspect.signature(model.forward).bind(*call[0], **call[1])
    except TypeError as error:
        expected = ", ".join(inspect.signature(model.forward).parameters)
        raise TraceError(f"example_inputs do not fit {type(model).__name__}.forward({expected}): {error}.") from None
    bound.apply_defaults()
    return dict(bound.arguments)


def check_model(model: object) -> None:
    """Refuse what is no model, or one that is wrapped, compiled or rewritten already."""
    if not isinstance(model, nn.Module):
        what = (
            f"the class {model.__name__}; make an instance" if isinstance(model, type) else f"{type(model).__name__}; wrap it in a module"
        )
        raise TraceError(f"graphreg takes a torch.nn.Module, not {what}.")
    kinds = {kind.__name__ for kind in type(model).__mro__}
    wrappers = {"OptimizedModule", "DistributedDataParallel", "DataParallel", "FullyShardedDataParallel", "FSDPModule"}
    wrapper = next(iter(kinds & wrappers), "module.compile()" if model._compiled_call_impl is not None else None)
    if wrapper:
        raise TraceError(
            f"this model is wrapped already ({wrapper}). The order is: adapters, then graphreg.regularize, then "
            "torch.compile, then the distributed wrapper. Give regularize the model inside."
        )
    if getattr(model, "graphreg_rules", None) is not None:
        if isinstance(model, fx.GraphModule):
            raise TraceError(
                "this model is rewritten already. graphreg.strip(module) gives it back without the additions; regularize that."
            )
        raise TraceError(f"{type(model).__name__} has something called graphreg_rules, the name that additions go under. Rename it.")
    if isinstance(model, torch.jit.ScriptModule):
        raise TraceError(f"{type(model).__name__} is compiled by torch.jit. Give regularize the model it was made from.")
    if type(model).forward is nn.Module.forward and "forward" not in model.__dict__:
        raise TraceError(f"{type(model).__name__} has no forward, so there is nothing to trace.")
    if model._backward_hooks or model._backward_pre_hooks:
        raise TraceError(
            f"{type(model).__name__} has backward hooks on the whole model, which a graph cannot carry. "
            "Remove them, regularize, and register them on the result."
        )


def _is_data(value: Any) -> bool:
    if isinstance(value, (tuple, list, dict)):
        items = value.values() if isinstance(value, dict) else value
        return any(map(_is_data, items)) or not value
    return isinstance(value, torch.Tensor)


def _held(model: nn.Module, bound: Mapping[str, Any] | None) -> dict[str, Any]:
    """The arguments fixed at their value: those of the example that are no data, or the optional ones at their defaults.

    A proxy in place of None takes the wrong branch without a word. A GraphModule has taken its branches already.
    """
    if isinstance(model, fx.GraphModule):
        return dict(getattr(model, "held", {}))
    if bound is not None:
        return {name: value for name, value in bound.items() if not _is_data(value)}
    return {n: p.default for n, p in inspect.signature(model.forward).parameters.items() if p.default is not p.empty}


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


def _symbolic(
    model: nn.Module, held: Mapping[str, Any], constants: dict[str, torch.Tensor], examples: Mapping[str, Any]
) -> tuple[Graphs, dict[str, str]]:
    leaves: dict[str, str] = {}

    def once() -> fx.Graph:
        before = set(model.__dict__)
        tracer = SiteTracer(leaves, dict(held), examples)
        try:
            graph = tracer.trace(model)
        except Unprepared:
            prepare()
            tracer = SiteTracer(leaves, dict(held), examples)
            graph = tracer.trace(model)
        leaves.update(tracer.leaves)
        _take_constants(model, graph, before, constants)
        return graph

    try:
        before = -1
        while before != len(leaves):  # a leaf of one mode is a leaf of both
            before = len(leaves)
            graphs = trace_modes(model, once)
        return graphs, leaves
    except GraphRegError:
        raise
    except Exception as error:
        raise TraceError(_where(model, error, bool(examples))) from error


def _where(model: nn.Module, error: Exception, examples: bool) -> str:
    here = (os.path.dirname(torch.__file__), os.path.dirname(__file__))
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(here)]
    place = f" at {frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line}" if frames else ""
    return (
        f"{type(model).__name__} cannot be traced symbolically{place} ({str(error).strip() or type(error).__name__}). "
        "Move that step into a submodule of its own (graphreg keeps a submodule it cannot trace whole), mark a helper "
        "function with torch.fx.wrap, or take the decision from a constant rather than from a tensor."
        + ("" if examples else " Where it is taken from a shape, give example_inputs: it then follows theirs, and the graph asserts so.")
    )
