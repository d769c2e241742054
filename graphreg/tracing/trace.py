"""The front door of tracing: a model goes in, graphs and sites come out, the model stays as it was."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, Literal

import torch
from torch import fx, nn

from graphreg.errors import GraphRegError, TraceError, shown
from graphreg.ir import (
    RULES,
    Graphs,
    Label,
    Names,
    NativeDropout,
    Operations,
    Site,
    check_names,
    find_native_dropouts,
    fixed,
    specialized_arguments,
    stacks,
    value_sites,
)
from graphreg.torch_internals import (
    Changes,
    at_rest,
    compiles_itself,
    deep_enough,
    draws_watched,
    has_backward_hooks,
    pytree,
    raise_interrupt,
    randomness,
    restore_after_trace,
    restore_randomness,
    stirred,
)
from graphreg.tracing.export.export import FrontEndError, export
from graphreg.tracing.fake_inputs import Arguments, arguments, propagate
from graphreg.tracing.graph_module import given_graphs
from graphreg.tracing.shape_decisions import decisions
from graphreg.tracing.side_effects.retrace import left_as_it_was
from graphreg.tracing.symbolic.symbolic import symbolic

FrontEnd = Literal["auto", "symbolic", "export"]
FRONT_ENDS = ("auto", "symbolic", "export")
_ONE_AT_A_TIME = threading.RLock()  # torch.fx has its own in the place of nn.Module's methods meanwhile, for all threads


@dataclass(frozen=True)
class Traced:
    """A traced model: its graphs by mode (``both``, or ``train`` and ``eval``) and its sites.

    ``leaves`` are the submodules kept whole, with the reason; ``held`` the arguments fixed at their value; ``notes`` what else
    the choice of the front end has to tell.
    """

    model: nn.Module
    graphs: Graphs
    values: tuple[Site, ...]
    leaves: Mapping[str, str] = field(default_factory=dict)
    held: Mapping[str, Any] = field(default_factory=dict)
    front_end: str = "symbolic"
    constants: Mapping[str, torch.Tensor] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @classmethod
    def untraced(cls, model: nn.Module) -> Traced:
        """A model whose graphs are not known yet: its parameters are its only sites."""
        return cls(model, {}, ())

    @cached_property
    def parameters(self) -> tuple[Site, ...]:
        """The parameters as sites, named by ``named_parameters()``: each once; one that is tied has the other names too."""
        modules, names = self.operations.modules, dict[int, list[str]]()
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), []).append(name)
        return tuple(parameter_site(modules, names[id(p)], p) for p in self.model.parameters())

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
    def own_dropout(self) -> tuple[NativeDropout, ...]:
        """The model's own dropouts, and what else of it draws."""
        return find_native_dropouts(self.graphs, self.operations, self.leaves)

    @cached_property
    def operations(self) -> Operations:
        return Operations(self.model)


def parameter_site(modules: Mapping[str, nn.Module], names: Sequence[str], parameter: nn.Parameter) -> Site:
    owner = names[0].rpartition(".")[0]
    labels = tuple(Label(name, type(modules[name.rpartition(".")[0]]).__name__) for name in names)
    if nn.parameter.is_lazy(parameter):
        return Site(labels, "parameter", module=owner, selectable=False, why_not="not initialized yet")
    return Site(labels, "parameter", module=owner, shape=tuple(parameter.shape), dtype=parameter.dtype)


def trace(model: nn.Module, example_inputs: Any = None, front_end: FrontEnd = "auto") -> Traced:
    """Trace a model in both of its modes.

    ``example_inputs``: a tensor, a tuple (positional) or a dict (keyword); with them the sites know shapes and dtypes.
    Optional arguments that the example does not carry are held at their defaults.
    Raises TraceError with the line of the user's forward that cannot be traced.
    """
    check_model(model)
    with _ONE_AT_A_TIME, Changes() as changes, changes:
        restore_after_trace(changes)
        with draws_watched(), torch.enable_grad():  # as in training, wherever it is called
            changes.later(partial(restore_randomness, randomness()))  # the model's code may draw; the user's streams go on as if not
            stirred()
            at_rest(changes)
            deep_enough(model, changes)
            return _trace(model, example_inputs, front_end)


def _trace(model: nn.Module, example_inputs: Any, front_end: FrontEnd) -> Traced:
    if front_end not in FRONT_ENDS:
        raise GraphRegError(f"front_end={shown(front_end)} is unknown; it is one of {', '.join(map(repr, FRONT_ENDS))}.")
    call = arguments(example_inputs)
    bound = bind(model, call)
    held = _held(model, bound if call else None)
    if isinstance(model, fx.GraphModule):
        if front_end == "export":
            raise TraceError("a GraphModule is taken as it is, so front_end='export' has nothing to do. Leave front_end out.")
        graphs = given_graphs(model)
        if call:
            propagate(model, graphs, bound, call, {})
        return Traced(model, graphs, value_sites(model, graphs), {}, held)
    return _traced(model, front_end, held, bound, call)


def _traced(model: nn.Module, front_end: FrontEnd, held: Mapping[str, Any], bound: Mapping[str, Any], call: Arguments | None) -> Traced:
    """The first front end of those asked for that takes the model."""
    if front_end == "export":
        return _exported(model, held, call, None)
    try:
        symbolically = _symbolically(model, held, bound, call)
    except GraphRegError as met:  # also of sizes that the trace does not follow
        raise_interrupt(met)
        if front_end == "symbolic" or (call is None and not isinstance(met, TraceError)):
            raise
        return _exported(model, held, call, met)
    kept = [path for path in stacks(model) if path in symbolically.leaves]
    if front_end == "symbolic" or call is None or not kept:
        return symbolically
    try:
        return _exported(model, held, call, TraceError(f"torch.fx does not see into {', '.join(kept)}"))
    except TraceError as error:
        raise_interrupt(error)
        note = f"front end: symbolic, for {str(error.__cause__).rstrip('.')}"
        return replace(symbolically, notes=(*symbolically.notes, note))


def _symbolically(model: nn.Module, held: Mapping[str, Any], bound: Mapping[str, Any], call: Arguments | None) -> Traced:
    constants = dict[str, torch.Tensor]()
    with left_as_it_was(model):
        graphs, leaves, assumed = symbolic(model, held, constants, bound)
        if call:
            propagate(model, graphs, bound, call, constants)
    notes = tuple(f"taken for a tensor: {name}, of which isinstance is asked (example_inputs tell if it is none)" for name in assumed)
    return Traced(model, graphs, value_sites(model, graphs), leaves, held, constants=constants, notes=notes)


def _exported(model: nn.Module, held: Mapping[str, Any], call: Arguments | None, met: GraphRegError | None) -> Traced:
    """By torch.export; ``met``: what the symbolic front end has against the model."""
    if call is None:
        if met is None:
            raise TraceError(f"front_end='export' runs {type(model).__name__}, so it needs example_inputs: a tensor, a tuple or a dict.")
        raise TraceError(f"{met} With example_inputs graphreg goes on to torch.export, which follows more than torch.fx.") from met
    constants, leaves, notes = dict[str, torch.Tensor](), dict[str, str](), list[str]()
    if met is not None:
        why = str(met).partition(". ")[0].rstrip(".")
        notes.append(f"front end: export, for {why}{')' * (why.count('(') - why.count(')'))}")
    try:
        with left_as_it_was(model):
            graphs = export(model, call, leaves, constants, notes)
    except TraceError as error:
        if met is None:
            raise
        if isinstance(error, FrontEndError):
            raise FrontEndError(f"{error} torch.fx alone does not take this model: {met}") from error
        raise TraceError(
            f"{met} Nor does torch.export take it: {error} What is left is the backend, which takes a model in parts: "
            "torch.compile(model, backend=graphreg.backend(...))."
        ) from error
    return Traced(model, graphs, value_sites(model, graphs), leaves, held, "export", constants, tuple(notes))


def names(model_or_traced: nn.Module | Traced, example_inputs: Any = None, front_end: FrontEnd = "auto") -> Names:
    """Every site of a model: name, op, shape, dtype, role. Prints as a table, iterates over names; asks and raises what ``trace`` does."""
    traced = model_or_traced if isinstance(model_or_traced, Traced) else trace(model_or_traced, example_inputs, front_end)
    notes = [f"kept whole: {path} ({reason})" for path, reason in traced.leaves.items()]
    notes += [f"held: {name}={value!r} (give example_inputs that carry it to trace it)" for name, value in traced.held.items()]
    notes += [*traced.notes, *decisions(next(iter(traced.graphs.values()))), *fixed(next(iter(traced.graphs.values())))]
    notes += [f"own dropout: {own.text}" for own in traced.own_dropout]
    read = {site.name for site in traced.parameters}  # by the forward itself: one line is enough for the parameter and its value
    listed = [site for site in traced.sites if site.kind == "parameter" or site.why_not != "a parameter" or site.name not in read]
    return Names(traced.title, listed, notes)


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
    wrapper = next(iter(kinds & wrappers), "module.compile()" if compiles_itself(model) else None)
    if wrapper:
        raise TraceError(
            f"this model is wrapped already ({wrapper}). The order is: adapters, then graphreg.regularize, then "
            "torch.compile, then the distributed wrapper. Give regularize the model inside."
        )
    if any(kind.__name__ == "DTensor" for p in model.parameters() for kind in type(p).__mro__):
        raise TraceError(
            "this model's parameters are sharded already (DTensor). Rewrite first, wrap second: graphreg.regularize, then "
            "torch.compile, then fully_shard or parallelize_module."
        )
    if isinstance(model, fx.GraphModule) and getattr(model, RULES, None) is not None:
        raise TraceError("this model is rewritten already. graphreg.strip(module) gives it back without the additions; regularize that.")
    check_names(model)
    if isinstance(model, torch.jit.ScriptModule):
        raise TraceError(f"{type(model).__name__} is compiled by torch.jit. Give regularize the model it was made from.")
    if type(model).forward is nn.Module.forward and "forward" not in model.__dict__:
        raise TraceError(f"{type(model).__name__} has no forward, so there is nothing to trace.")
    if has_backward_hooks(model):
        raise TraceError(
            f"{type(model).__name__} has backward hooks on the whole model, which a graph cannot carry. "
            "Remove them, regularize, and register them on the result."
        )


def _is_data(value: Any) -> bool:
    if isinstance(value, (tuple, list, dict)):
        items = value.values() if isinstance(value, dict) else value
        return any(map(_is_data, items)) or not value
    return isinstance(value, torch.Tensor) or any(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(value))


def _held(model: nn.Module, bound: Mapping[str, Any] | None) -> dict[str, Any]:
    """The arguments fixed at their value: those of the example that are no data, or the optional ones at their defaults.

    A proxy in place of None takes the wrong branch without a word. A GraphModule has taken its branches already.
    """
    if isinstance(model, fx.GraphModule):
        return specialized_arguments(model)
    if bound is not None:
        return {name: value for name, value in bound.items() if not _is_data(value)}
    return {n: p.default for n, p in inspect.signature(model.forward).parameters.items() if p.default is not p.empty}
