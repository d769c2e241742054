"""Defines ``trace``, which turns a model into graphs and sites, and leaves the model unchanged."""

from __future__ import annotations

import inspect
import io
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from types import BuiltinFunctionType, FunctionType
from typing import Any, ClassVar, Literal

import torch
from torch import fx, nn

from graphreg.errors import GraphRegError, OtherInputs, RenamedAttributes, TraceError, check_flag, listed, shown
from graphreg.ir.comparison import digest
from graphreg.ir.contents import contents_of, copied_contents, may_change, parts
from graphreg.ir.module_calls import record_stacks
from graphreg.ir.module_record import PLACED, RULES, check_model_names, specialized_arguments, state_of
from graphreg.ir.operations import NORM_MODULES, Operations, is_normalization, is_scale, is_stack
from graphreg.ir.parameter_reads import ParameterReads, parameter_reads
from graphreg.ir.random_ops import NativeDropout, find_native_dropouts, try_drop_paths
from graphreg.ir.roles import NORM_CLASS, value_sites
from graphreg.ir.site import Label, Site
from graphreg.ir.source_location import forward_line
from graphreg.ir.train_eval import ModeGraphs, why_not_in_eval
from graphreg.ir.unit_axes import UnitFinder
from graphreg.torch_internals import pytree
from graphreg.torch_internals.distributed import class_name
from graphreg.torch_internals.interpreter import at_rest, deep_enough
from graphreg.torch_internals.modules import (
    buffers_by_name,
    compiles_itself,
    has_backward_hooks,
    has_users_global_hook,
    modules_by_path,
    parameters_by_name,
    put_global_hooks_aside,
    without_cached_weights,
)
from graphreg.torch_internals.other_threads import alone
from graphreg.torch_internals.patching import Changes, raise_interrupt
from graphreg.torch_internals.random_state import may_be_anothers, randomness, regions, restore_randomness, with_draws_restored
from graphreg.torch_internals.torch_modes import tracer_here
from graphreg.torch_internals.trace_state import restore_after_trace
from graphreg.torch_internals.versions import warn_if_untested
from graphreg.tracing.capturing import NeedsHooks, install_hooks, stop_before_hooks
from graphreg.tracing.checkpoints import CHECKPOINTS, see_through_checkpoints
from graphreg.tracing.export.export import FrontEndError, export
from graphreg.tracing.fake_inputs import Arguments, arguments, no_shape, propagate
from graphreg.tracing.graph_module import labelled_graphs
from graphreg.tracing.proof.proof import CURE, MODES, NO_INPUTS, NOT_ASKED, Claim, NotTheModel, Proving, proof_key, proof_keys, prove
from graphreg.tracing.refusals import forward_text
from graphreg.tracing.settled_reads import settle_reads
from graphreg.tracing.side_effects.opaque_modules import function_of
from graphreg.tracing.side_effects.retrace import model_restored, or_make_opaque
from graphreg.tracing.side_effects.snapshot import Snapshot, assignments_noted
from graphreg.tracing.symbolic.holders import is_container
from graphreg.tracing.symbolic.symbolic import same_apart_from_sharing, symbolic
from graphreg.tracing.symbolic.tracer import DrawsRandomly

FrontEnd = Literal["auto", "symbolic", "export"]
FRONT_ENDS = ("auto", "symbolic", "export")
NOT_ASSIGNED = "not assigned"  # how the note on attributes that only the forward assigns begins
_BIAS = re.compile(r"(^|_)bias(es)?(_|$)")  # in the name of a parameter
_SHOWN = 4  # the number of names that a note lists
_ASSIGNED_SHOWN = 12
_TRAIN_ALONE = (
    "That is in eval mode; in train mode it can be traced. Regularize it in place, which takes no graph for eval mode, where the model's "
    "own forward runs: graphreg.regularize_, without eval_penalties=True."
)


class InTrainAlone(TraceError):
    """A model can be traced in train mode alone."""


@dataclass(frozen=True)
class Traced(RenamedAttributes):
    """A traced model: its graphs and its sites.

    Attributes:
        model: The model that was traced.
        graphs: ``{"both": graph}`` if one graph serves train and eval mode, else ``{"train": ..., "eval": ...}``.
        values: The sites that are values of the graphs, not parameters.
        opaque_modules: For the path of each opaque module, the reason why the tracer cannot see into it.
        specialized: The specialized arguments by name, with the values that the graphs fix. Lists and objects are copies.
        front_end: The front end that made the graphs: ``symbolic`` or ``export``.
        asked_front_end: The option ``front_end`` of ``trace``.
        constants: The tensors that the forward made during the trace and that the graphs read as constants, by name.
        notes: Remarks for listings and reports, a line each, such as why this front end was chosen.
        unproved: For each mode in which the graph was not compared with the model on inputs, the reason (``proof_key``).
        asks_autocast: Whether the forward may ask whether autocast is on, or has blocks of it of its own.
        arguments: The example inputs by the names of the parameters, defaults included, with a ``TensorKind`` for each tensor; None without
            example inputs.
        shares: Whether the forward asks whether arguments are one tensor (``q is k``), and the graphs hold only if they are.
        checkpoints: The modules whose callers checkpoint them, as timm's models do: by path, whether the checkpoint is reentrant.
        digest: The digest of the graphs and constants as they were traced.
        of_opaque: The names of what opaque modules changed meanwhile (``self.block.queue``).
    """

    renamed: ClassVar[Mapping[str, str]] = {"leaves": "opaque_modules", "held": "specialized", "own_dropout": "native_dropout"}
    model: nn.Module
    graphs: ModeGraphs
    values: tuple[Site, ...]
    opaque_modules: Mapping[str, str] = field(default_factory=dict)
    specialized: Mapping[str, Any] = field(default_factory=dict)
    front_end: str = "symbolic"
    constants: Mapping[str, torch.Tensor] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    asked_front_end: FrontEnd = "auto"
    unproved: Mapping[str, str] = field(default_factory=dict)
    arguments: Mapping[str, Any] | None = None
    shares: bool = False
    checkpoints: Mapping[str, bool] = field(default_factory=dict)
    digest: str = ""
    of_opaque: frozenset[str] = frozenset()
    asks_autocast: bool = False

    @classmethod
    def untraced(cls, model: nn.Module) -> Traced:
        """Return a trace without graphs: the model's parameters are its only sites."""
        return cls(model, {}, ())

    @cached_property
    def parameters(self) -> tuple[Site, ...]:
        """The model's parameters as sites. Each appears once; a tied parameter has all of its names as labels."""
        modules, named = self.operations.modules, dict[int, tuple[nn.Parameter, list[str]]]()
        for path, module in modules.items():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    named.setdefault(id(parameter), (parameter, []))[1].append(f"{path}.{name}" if path else name)
        return tuple(parameter_site(modules, names, parameter) for parameter, names in named.values())

    @property
    def sites(self) -> tuple[Site, ...]:
        """All sites: values first, then parameters."""
        return (*self.values, *self.parameters)

    @property
    def whole(self) -> bool:
        """Whether the graphs cover the model's whole forward. False only in the subclass for graphs of Dynamo, which may cover a part."""
        return True

    @property
    def title(self) -> str:
        """The model's class name, for messages and listings. The suffix of ``GraphModuleImpl``, a class of torch.fx, is left out."""
        name = type(self.model).__name__
        return name.removesuffix("Impl") if isinstance(self.model, fx.GraphModule) else name

    @cached_property
    def native_dropout(self) -> tuple[NativeDropout, ...]:
        """The native dropouts: all random operations that the model itself contains."""
        return find_native_dropouts(self.graphs, self.operations, self.opaque_modules, self.constants)

    @cached_property
    def parameter_reads(self) -> Mapping[str, ParameterReads]:
        """Where each graph reads the model's parameters: by mode, then by the name of the parameter's site."""
        return {mode: parameter_reads(graph, self.parameters) for mode, graph in self.graphs.items()}

    @cached_property
    def unit_finder(self) -> UnitFinder:
        """Finds which axes of the values have the units of the layers that made them."""
        return UnitFinder(self.graphs, self.operations)

    @cached_property
    def operations(self) -> Operations:
        """Facts about the operations of the graphs."""
        return Operations(self.model)


def parameter_site(modules: Mapping[str, nn.Module], names: Sequence[str], parameter: nn.Parameter) -> Site:
    """Return the site of a parameter.

    Args:
        modules: The model's modules by path.
        names: All names of the parameter; the first one becomes the site's name.
        parameter: The parameter, which may be uninitialized.
    """
    owner = names[0].rpartition(".")[0]
    labels = tuple(Label(name, class_name(modules[name.rpartition(".")[0]])) for name in names)
    if nn.parameter.is_lazy(parameter):
        return Site(labels, "parameter", module=owner, selectable=False, why_not="not initialized yet")
    numbers = parameter.is_floating_point()  # formulas take real numbers; others, as of quantized layers, cannot train
    # a mean over no elements is nan
    why_not = f"of {parameter.dtype}" if not numbers else "" if parameter.numel() else "without elements"
    split = (name.rpartition(".") for name in names)
    norm = any(_BIAS.search(own) or is_scale(modules[path], own) or _is_norm(modules[path]) for path, _, own in split)
    site = Site(labels, "parameter", module=owner, shape=tuple(parameter.shape), dtype=parameter.dtype, norm=norm)
    return replace(site, selectable=not why_not, why_not=why_not)


def _is_norm(module: nn.Module) -> bool:
    """Return whether a module is a normalization. A ``NormedLinear`` and a ``LinearWeightNorm`` are none: their weights are matrices."""
    if isinstance(module, NORM_MODULES):
        return True
    # a matrix has a bias or a scale for one of its axes
    parameters = [parameter for parameter in module.parameters(recurse=False) if not nn.parameter.is_lazy(parameter)]
    lengths = [[length for length in parameter.shape if length != 1] for parameter in parameters]
    is_matrix = any(len(one) > 1 and len(other) == 1 and other[0] in one for one in lengths for other in lengths)
    return is_normalization(module) and NORM_CLASS.search(class_name(module)) is not None and not is_matrix


# traces with a front end: it gets the stateful submodules, and a snapshot since which nothing has changed
_Trace = Callable[[Mapping[str, str], Snapshot], Traced]


def trace(model: nn.Module, example_inputs: Any = None, front_end: FrontEnd = "auto", prove: bool = True) -> Traced:
    """Trace a model in train mode and in eval mode. The model itself stays unchanged.

    Args:
        model: The model to trace.
        example_inputs: A tensor, a tuple (positional) or a dict (keyword). With them the sites have shapes and dtypes. Arguments for
            which the example has no tensor are specialized: the graphs fix them at the example's value, or at their default. Without
            an example, all optional arguments are specialized.
        front_end: ``"symbolic"`` for torch.fx, ``"export"`` for torch.export, or ``"auto"`` to try them in this order.
        prove: Whether to run the model and its graph on the example inputs, in both modes, and to refuse a graph that does not give the
            model's result. ``"auto"`` then tries the next front end.

    Returns:
        The graphs and the sites.

    Raises:
        TraceError: The model cannot be traced, or its graph does not give its result. If a line of the user's code is the cause, the
            message names it.
    """
    check_flag("prove", prove)
    return traced_for_proof(model, example_inputs, front_end, Proving(asked=prove))


def traced_for_proof(model: nn.Module, example_inputs: Any, front_end: FrontEnd, proving: Proving, inputs: Collection[str] = ()) -> Traced:
    """Do what ``trace`` does. ``proving``: how to prove the graphs. ``inputs``: as in ``traced_for_call``."""
    traced = traced_for_call(model, arguments(example_inputs), front_end, proving, inputs)
    return traced if front_end == "auto" else replace(traced, asked_front_end=front_end)


def traced_for_call(
    model: nn.Module, call: Arguments | None, front_end: FrontEnd, proving: Proving, inputs: Collection[str] = ()
) -> Traced:
    """Do what ``traced_for_proof`` does, for the arguments of a call. ``inputs``: arguments that are no tensors, and not specialized."""
    warn_if_untested()
    check_traceable(model)
    refuse_arguments(model, call)
    with Changes() as changes, changes:
        # first of all, since other threads of the process see what the lines below change
        alone(changes)
        restore_after_trace(changes)
        put_global_hooks_aside(changes)
        without_cached_weights(changes)
        at_rest(changes)
        deep_enough(model, changes)
        see_through_checkpoints(model, changes)
        stop_before_hooks(changes)
        with torch.enable_grad(), assignments_noted() as assigned:  # as in training, even if the caller is under torch.no_grad
            traced: Traced | None = None
            while traced is None:
                try:
                    # The model may draw random numbers, but the user's generators must not advance.
                    traced = with_draws_restored(partial(_trace, model, call, front_end, proving, inputs))
                except NeedsHooks as needed:
                    install_hooks(needed.model, changes)
        # an opaque module runs its own forward at each call of the graph, and so assigns the same
        inside = tuple(f"{path}." for path in traced.opaque_modules)
        names = [name for each in assigned if not (name := each.removeprefix("self.")).startswith(inside)]
        traced = replace(traced, of_opaque=frozenset(assigned.keys() - {f"self.{name}" for name in names}))
        if names:
            note = f"{NOT_ASSIGNED}: {listed(names, _ASSIGNED_SHOWN)}. The forward assigns this, and the graph does not"
            traced = replace(traced, notes=(*traced.notes, note))
        for graph in traced.graphs.values():
            record_stacks(graph)
            for node in graph.find_nodes(op="placeholder"):
                node.meta.setdefault("origin", forward_line(model))
    return traced


def _trace(model: nn.Module, call: Arguments | None, front_end: FrontEnd, proving: Proving, inputs: Collection[str]) -> Traced:
    if front_end not in FRONT_ENDS:
        raise GraphRegError(f"front_end={shown(front_end)} is unknown; it is one of {', '.join(map(repr, FRONT_ENDS))}.")

    bound = bind(model, call)
    _refuse_caches(bound)
    specialized = {name: value for name, value in _specialized(model, bound if call else None).items() if name not in inputs}
    _require_data(model, bound, specialized)
    call = _with_defaults(model, call, specialized) if call else None
    before = {name: contents_of(value) for name, value in specialized.items() if may_change(value)}
    # the caller may change a list or an object after the trace
    copies = dict[int, Any]()
    kept = {name: copied_contents(value, copies, is_data=name not in specialized) for name, value in {**specialized, **bound}.items()}
    try:
        with _undrawn(model, specialized):
            traced = _trace_from(model, front_end, specialized, bound, call, proving)
    except TraceError:  # perhaps because of such a change
        _require_unchanged(model, specialized, before)
        raise
    _require_unchanged(model, specialized, before)
    made = digest(traced.graphs, traced.constants)
    traced = replace(traced, specialized={name: kept[name] for name in specialized}, arguments=kept if call else None, digest=made)
    return traced


def refuse_arguments(model: nn.Module, call: Arguments | None) -> None:
    """Raise TraceError for an iterator, which a trace would use up, a container in itself, and attributes of a named tuple, in a call."""
    for value, within, _ in parts(call):
        if isinstance(value, tuple) and hasattr(value, "_fields") and getattr(value, "__dict__", None):
            raise TraceError(
                f"the call carries a {type(value).__name__}, a named tuple with attributes ({listed([*vars(value)], _SHOWN)}), which a "
                "copy of it has not. Pass them as arguments of their own."
            )
        if hasattr(type(value), "__next__") and not isinstance(value, io.IOBase):  # an object may hold a file
            raise TraceError(
                f"the call carries an iterator, of class {type(value).__name__}, and a trace of {type(model).__name__} would use it up. "
                "Nothing was taken from it. Pass a list or a tuple: list(iterator)."
            )
        around = next((within[i:] for i, each in enumerate(within) if each is value), ())
        if around and all(map(is_container, around)):
            raise TraceError(
                f"the call carries a {type(value).__name__} that contains itself, which a graph cannot take apart. "
                "Pass what the forward reads of it as arguments of their own."
            )


def _require_data(model: nn.Module, bound: Mapping[str, Any], specialized: Mapping[str, Any]) -> None:
    """Raise TraceError if all tensors of a call are in objects that torch's pytree does not take apart: the graph would have no inputs."""
    if any(name not in specialized and _is_data(value) for name, value in bound.items()):
        return
    for name in bound.keys() & specialized.keys():
        value = specialized[name]
        tensors = (part for part, _, _ in parts(dict(value) if isinstance(value, Mapping) else value) if isinstance(part, torch.Tensor))
        if not _is_data(value) and any(True for _ in tensors):
            kind = type(value).__name__
            raise TraceError(
                f"{type(model).__name__} gets its tensors in {name}, an object of class {kind} that torch's pytree does not take apart, so "
                f"the graph would have none as inputs. Register the class (a dataclass by torch.export.register_dataclass({kind})), or "
                "pass a dict, or the tensors as arguments of their own."
            )


def _refuse_caches(bound: Mapping[str, Any]) -> None:
    """Raise TraceError if a call passes a ``Cache`` of transformers: the forward would fill the caller's object, which a graph does not."""
    for value in pytree.tree_leaves(bound):
        if any(kind.__name__ == "Cache" and kind.__module__.startswith("transformers.") for kind in type(value).__mro__):
            raise TraceError(
                f"the call carries a {type(value).__name__}, and a graph cannot read or fill a cache that it gets. Leave the cache out: "
                "the model then makes one and returns it. A model that is regularized in place takes a cache in eval mode: call "
                "model.eval() first, as for generation, and generate within graphreg.noise_on by use_cache=False."
            )


def _require_unchanged(model: nn.Module, specialized: Mapping[str, Any], before: Mapping[str, str]) -> None:
    """Raise TraceError if a trace has changed the contents of a specialized argument. ``before``: the contents, by name."""
    changed = [name for name, contents in before.items() if contents_of(specialized[name]) != contents]
    if changed:
        raise TraceError(
            f"the forward of {type(model).__name__} changes the contents of its argument {changed[0]}, which a graph would not do. "
            "Change a copy in the forward, or make the change before the call."
        )


@contextmanager
def _undrawn(model: nn.Module, specialized: Mapping[str, Any]) -> Iterator[None]:
    """Put the random generators among the arguments back after a trace; raise TraceError if the forward has drawn from one."""
    states = {name: value.get_state() for name, value in specialized.items() if isinstance(value, torch.Generator)}
    error = None
    try:
        yield
    except TraceError as raised:  # perhaps because of the draw
        error = raised
    drawn = [name for name, state in states.items() if not torch.equal(specialized[name].get_state(), state)]
    for name in drawn:
        specialized[name].set_state(states[name])
    if drawn:
        raise TraceError(
            f"the forward of {type(model).__name__} draws from its argument {drawn[0]}, a random generator, and a graph would keep the "
            "draws of the trace. Draw before the call, and pass what was drawn."
        ) from error
    if error is not None:
        raise error


def _trace_from(
    model: nn.Module, front_end: FrontEnd, specialized: Mapping[str, Any], bound: Mapping[str, Any], call: Arguments | None,
    proving: Proving,
) -> Traced:  # fmt: skip
    """Trace a model, or take the graph of a GraphModule."""
    if isinstance(model, fx.GraphModule):
        if front_end == "export":
            raise TraceError("a GraphModule already has a graph, so front_end='export' does not apply to it. Leave front_end out.")
        graphs = labelled_graphs(model)
        if call:
            propagate(model, graphs, bound, call, {})
        for graph in graphs.values():
            settle_reads(graph, model)
        # ``strip`` leaves a GraphModule, and its blocks are still to be checkpointed
        checkpoints = {} if (state := state_of(model)) is None else state.checkpoints
        return _proved(Traced(model, graphs, value_sites(model, graphs), {}, specialized, checkpoints=checkpoints), call, proving)
    return _trace_with(model, front_end, specialized, bound, call, proving)


def _proved(traced: Traced, call: Arguments | None, proving: Proving, earlier: Snapshot | None = None) -> Traced:
    """Prove the graphs of a trace on the example inputs, and return the trace with the modes that could not be proved.

    ``earlier``: as in ``model_restored``.

    Raises:
        NotTheModel: A graph does not give what the model gives.
        InTrainAlone: There is no graph for eval mode, in which it would run.
    """
    if (why := why_not_in_eval(traced.graphs)) and proving.eval_runs:
        raise InTrainAlone(f"{why} {_TRAIN_ALONE}")
    if not proving.asked:
        return replace(traced, unproved=dict.fromkeys(MODES, NOT_ASKED))
    if call is None:
        return replace(traced, unproved={key: NO_INPUTS for mode in MODES for key in proof_keys(mode, traced.asks_autocast)})
    claim = Claim(traced.model, traced.graphs, traced.constants, traced.specialized, traced.front_end)
    reasons = prove(claim, call, proving, earlier)
    with proving.around():
        proved = {proof_key(mode, traced.asks_autocast): mode for mode in proving.modes}
    later = {key: NO_INPUTS for mode in proving.modes for key in proof_keys(mode, traced.asks_autocast) - proved.keys()}
    return replace(traced, unproved={key: reasons[mode] for key, mode in proved.items() if mode in reasons} | later)


def _traced_and_proved(trace: _Trace, model: nn.Module, call: Arguments | None, proving: Proving) -> Traced:
    """Trace and prove. If the proof shows that submodules are stateful, trace once more, with these opaque (``trace`` gets them)."""
    stateful: dict[str, str] = {}
    with model_restored(model) as before:
        while True:
            traced = or_make_opaque(lambda: _proved(trace(dict(stateful), before), call, proving, before), stateful)
            if traced is not None:
                return traced


def _trace_with(
    model: nn.Module, front_end: FrontEnd, specialized: Mapping[str, Any], bound: Mapping[str, Any], call: Arguments | None,
    proving: Proving,
) -> Traced:  # fmt: skip
    """Trace with the given front end, and prove the graph. ``"auto"`` tries torch.fx first and torch.export second.

    It also tries torch.export if torch.fx leaves a layer opaque that consists of layers, such as ``nn.TransformerEncoder``.
    """
    if front_end == "export":
        return _traced_and_proved(partial(_trace_by_export, model, specialized, call, None), model, call, proving)
    by_fx = partial(_trace_symbolically, model, specialized, bound, call)
    try:
        try:
            traced = _traced_and_proved(by_fx, model, call, proving)
        except NotTheModel as error:
            traced = _traced_under_autocast(by_fx, model, call, proving, error)
    except GraphRegError as symbolic_error:  # not only TraceError, because an assertion on sizes may fail during the trace
        raise_interrupt(symbolic_error)
        # If a draw may be another thread's, the caller traces again and counts draws: to export
        # would be in vain. Without inputs nothing can be exported, but a TraceError gets the advice
        # to give some.
        if front_end == "symbolic" or may_be_anothers() or (call is None and not isinstance(symbolic_error, TraceError)):
            raise
        return _exported_after(symbolic_error, model, specialized, call, proving)

    # of stacks inside one another, the error names the outer one
    stacks = [path for path, module in model.named_modules() if path and is_stack(module)]
    outermost = [path for path in stacks if not any(path.startswith(f"{outer}.") for outer in stacks)]
    opaque_stacks = [path for path in outermost if path in traced.opaque_modules]
    if front_end == "symbolic" or call is None or not opaque_stacks:
        return traced
    try:
        why = TraceError(f"torch.fx cannot see into {', '.join(opaque_stacks)}")
        return _exported_after(why, model, specialized, call, proving)
    except TraceError as error:
        # the graph of torch.fx is right, too: the stack is one node of it
        raise_interrupt(error)
        note = f"front end: symbolic, because {str(error.__cause__).rstrip('.')}"
        return replace(traced, notes=(*traced.notes, note))


def _traced_under_autocast(by_fx: _Trace, model: nn.Module, call: Arguments | None, proving: Proving, error: NotTheModel) -> Traced:
    """Trace with torch.fx under the autocast of the call, because the graph is not right there, or asserts other dtypes (``error``).

    Without autocast, the graph must be right or assert, too: the forward may ask for autocast itself. (torch.export would record casts.)
    """
    outside = regions()
    with proving.around():
        if regions() == outside:
            raise error
        traced = _traced_and_proved(by_fx, model, call, proving)
    try:
        return _proved(traced, call, replace(proving, around=nullcontext))
    except NotTheModel as without:
        if not isinstance(without.__cause__, OtherInputs):
            raise
    return traced


def _exported_after(
    symbolic_error: GraphRegError, model: nn.Module, specialized: Mapping[str, Any], call: Arguments | None, proving: Proving
) -> Traced:
    """Trace with torch.export because torch.fx could not, and prove the graph. ``symbolic_error``: why torch.fx could not."""
    try:
        return _traced_and_proved(partial(_trace_by_export, model, specialized, call, symbolic_error), model, call, proving)
    except NotTheModel as error:
        raise NotTheModel(f"{str(symbolic_error).removesuffix(CURE).rstrip()} torch.export cannot trace it either: {error}") from error
    except Exception as error:  # the model's own, which a run in eval mode has raised
        if isinstance(error, GraphRegError) or not isinstance(symbolic_error, InTrainAlone):
            raise
        raise symbolic_error from error


def _trace_symbolically(
    model: nn.Module, specialized: Mapping[str, Any], bound: Mapping[str, Any], call: Arguments | None, stateful: Mapping[str, str],
    before: Snapshot,
) -> Traced:  # fmt: skip
    """Trace with torch.fx. ``bound``: the example inputs by argument name; may be empty. ``stateful``, ``before``: as for ``_Trace``."""
    drawn = randomness()
    try:
        return _traced_by_fx(model, specialized, bound, call, stateful, before, watch_draws=False)
    except DrawsRandomly:
        restore_randomness(drawn)
        return _traced_by_fx(model, specialized, bound, call, stateful, before, watch_draws=True)


def _traced_by_fx(
    model: nn.Module, specialized: Mapping[str, Any], bound: Mapping[str, Any], call: Arguments | None, stateful: Mapping[str, str],
    before: Snapshot, watch_draws: bool,
) -> Traced:  # fmt: skip
    """Trace with torch.fx. ``watch_draws``: as in ``SiteTracer``."""
    constants = dict[str, torch.Tensor]()

    # whether two of the example inputs, or of the tensors in them, are one object
    inputs = [value for name, value in bound.items() if name not in specialized]
    tensors = pytree.tree_tensors(inputs)
    shares = len(set(map(id, tensors))) < len(tensors)

    with model_restored(model, before):
        try_drop_paths(model)
        # First each argument has a proxy of its own. If sharing makes no difference, this graph
        # also serves the calls that pass different tensors.
        found = symbolic(model, specialized, constants, bound, before, watch_draws, stateful, False if shares else None)
        if shares:  # the forward may ask whether arguments are one object, which a proxy cannot notice
            constants_shared = dict(constants)
            with model_restored(model, before):
                found_shared = symbolic(model, specialized, constants_shared, bound, before, watch_draws, stateful, True)
            if shares := not same_apart_from_sharing(found[0], found_shared[0]):
                found, constants = found_shared, constants_shared
        graphs, opaque, assumed, checkpoints, tracers = found
        if call:
            propagate(model, graphs, bound, call, constants, lambda graph: tracers[graph].all_values(graph, constants))

    for graph in graphs.values():
        settle_reads(graph, model)
    why = "because the forward calls isinstance on it (if it is not a tensor, give example_inputs)"
    functions = {key: reason for key, reason in opaque.items() if function_of(key) is not None}
    notes = [f"assumed to be a tensor: {name}, {why}" for name in assumed]
    if why := why_not_in_eval(graphs):
        notes.append(f"train mode alone: {why.partition('. ')[0]}")
    notes += [f"opaque function: {key.removesuffix('()')} ({reason})" for key, reason in functions.items()]
    sites = value_sites(model, graphs)
    kept: Any = {"constants": constants, "notes": tuple(notes), "shares": shares, "checkpoints": checkpoints}
    kept["asks_autocast"] = _asks_autocast(before) or any(tracer.switches_autocast for tracer in tracers.values())
    return Traced(model, graphs, sites, {path: why for path, why in opaque.items() if path not in functions}, specialized, **kept)


def _asks_autocast(before: Snapshot) -> bool:
    """Return whether the code of a model mentions a function that reads or sets whether autocast is on, or with which dtype."""
    functions = [value.__name__ for value in before.code.values() if type(value) in (FunctionType, BuiltinFunctionType)]
    return any("autocast" in name and name.startswith(("is_", "_is_", "get_", "set_")) for name in (*before.code.mentioned, *functions))


def _trace_by_export(
    model: nn.Module, specialized: Mapping[str, Any], call: Arguments | None, symbolic_error: GraphRegError | None,
    stateful: Mapping[str, str], before: Snapshot,
) -> Traced:  # fmt: skip
    """Trace with torch.export. ``symbolic_error``: why torch.fx could not trace all of the model; None if the user chose torch.export."""
    if call is None:
        if symbolic_error is None:
            raise TraceError(
                f"front_end='export' runs {type(model).__name__}, so it needs example_inputs: a tensor, a tuple or a dict "
                f"of the arguments of {forward_text(model)}."
            )
        # it gives that advice already, or torch.export would lose the checkpoints, too
        if "example_inputs" in str(symbolic_error) or CHECKPOINTS in str(symbolic_error):
            raise symbolic_error
        raise TraceError(
            f"{symbolic_error} With example_inputs graphreg also tries torch.export, which can trace more than torch.fx. They are a "
            f"tensor, a tuple or a dict of the arguments of {forward_text(model)}."
        ) from symbolic_error

    constants, opaque_modules, notes = dict[str, torch.Tensor](), dict(stateful), list[str]()
    if symbolic_error is not None:
        if CHECKPOINTS in str(symbolic_error):  # torch.export would lose the checkpoints of the model's own forward, too
            raise symbolic_error
        # its first sentence, which may end within a parenthesis
        why = str(symbolic_error).partition(". ")[0].rstrip(".")
        notes.append(f"front end: export, because {why}{')' * (why.count('(') - why.count(')'))}")

    try:
        with model_restored(model, before):
            graphs = export(model, call, opaque_modules, constants)
    except TraceError as error:
        if symbolic_error is None:
            raise
        if isinstance(error, FrontEndError):
            raise FrontEndError(f"{error} torch.fx cannot trace this model either: {symbolic_error}") from error
        raise TraceError(
            f"{symbolic_error} torch.export cannot trace it either: {error} Use the backend instead, which regularizes a model graph by "
            "graph: torch.compile(model, backend=graphreg.backend(...))."
        ) from error
    for graph in graphs.values():
        settle_reads(graph, model)
    kept = value_sites(model, graphs), opaque_modules, specialized, "export", constants, tuple(notes)
    return Traced(model, graphs, *kept, asks_autocast=True)  # it fixes dtypes, and by them what the forward decides


def bind(model: nn.Module, call: Arguments | None) -> dict[str, Any]:
    """Return the example inputs by argument name, defaults included; raise TraceError if they do not fit the forward."""
    if call is None:
        return {}
    try:
        bound = inspect.signature(model.forward).bind(*call[0], **call[1])
    except TypeError as error:
        expected = ", ".join(inspect.signature(model.forward).parameters)
        raise TraceError(f"example_inputs do not fit {type(model).__name__}.forward({expected}): {error}.{no_shape(call)}") from None
    bound.apply_defaults()
    return dict(bound.arguments)


def _with_defaults(model: nn.Module, call: Arguments, specialized: Mapping[str, Any]) -> Arguments:
    """Return a call with the tensors that are defaults: they are inputs of the graph, so the example inputs must have them."""
    bound = inspect.signature(model.forward).bind(*call[0], **call[1])
    given = set(bound.arguments)
    bound.apply_defaults()
    added = {name for name, value in bound.arguments.items() if name not in given and isinstance(value, torch.Tensor)}
    if not added - specialized.keys():
        return call
    # other defaults are specialized, and the trace takes them from the signature
    for name in bound.arguments.keys() - given - added:
        del bound.arguments[name]
    return bound.args, bound.kwargs


def check_traceable(model: object) -> None:
    """Raise TraceError if a model cannot be traced: it is wrapped, compiled, sharded or rewritten already, or another tracer runs here."""
    if not isinstance(model, nn.Module):
        what = (
            f"the class {model.__name__}; make an instance" if isinstance(model, type) else f"{type(model).__name__}; wrap it in a module"
        )
        raise TraceError(f"graphreg takes a torch.nn.Module, not {what}.")
    if tracer := tracer_here():
        raise TraceError(
            f"graphreg cannot trace {type(model).__name__} within {tracer}, where tensors are no plain tensors. Call graphreg.regularize "
            "before, outside of it, or once the model that is regularized in place. A model without memory may be on the meta device: "
            "with torch.device('meta')."
        )
    placed = next((path for path, inner in modules_by_path(model, once=True).items() if PLACED in vars(inner)), None)
    if placed is not None:
        what = f"the submodule {placed!r} of {type(model).__name__}" if placed else type(model).__name__
        raise TraceError(f"{what} is regularized in place already. Call graphreg.strip_ on it first.")

    # by name here and below, so that nobody who does not use torch.distributed has to import it
    kinds = {kind.__name__ for kind in type(model).__mro__}
    wrappers = {"OptimizedModule", "DistributedDataParallel", "DataParallel", "FullyShardedDataParallel", "FSDPModule"}
    wrapper = next(iter(kinds & wrappers), "module.compile()" if compiles_itself(model) else None)
    if wrapper:
        raise TraceError(
            f"this model is wrapped already ({wrapper}). The order is: adapters, then graphreg.regularize, then "
            "torch.compile, then the distributed wrapper. Give regularize the inner model."
        )
    if any(kind.__name__ == "DTensor" for each in set(map(type, parameters_by_name(model).values())) for kind in each.__mro__):
        raise TraceError(
            "this model's parameters are sharded already (DTensor). Rewrite first, wrap second: graphreg.regularize, then "
            "torch.compile, then fully_shard or parallelize_module."
        )

    if isinstance(model, fx.GraphModule) and getattr(model, RULES, None) is not None:
        raise TraceError("this model is rewritten already. graphreg.strip(module) returns it without the additions; regularize that.")
    if isinstance(model, torch.jit.ScriptModule):
        raise TraceError(f"{type(model).__name__} is compiled by torch.jit. Give regularize the model it was made from.")
    scripted = [path for path, inner in modules_by_path(model, once=True).items() if isinstance(inner, torch.jit.ScriptModule)]
    if scripted:
        raise TraceError(
            f"{scripted[0]!r} in {type(model).__name__} is compiled by torch.jit, which keeps its state out of Python's reach. Put the "
            "module that it was made from in its place."
        )

    named = {**parameters_by_name(model), **buffers_by_name(model)}
    lazy = next((name for name, tensor in named.items() if nn.parameter.is_lazy(tensor)), None)
    if lazy is not None:
        raise TraceError(
            f"{lazy} of {type(model).__name__} belongs to a lazy module, and has no shape yet: regularizers would leave it out. Run one "
            "forward first, model(*inputs), which gives it its shape."
        )
    if has_users_global_hook():
        raise TraceError(
            "a hook is registered for all modules (by torch.nn.modules.module.register_module_forward_hook and the like, or by a tool that "
            "counts or profiles). A trace would run it on stand-ins for tensors, and the graph would repeat what it does, although it also "
            "runs at each call. Register it after the trace: after graphreg.regularize, or after the first call of a model in place."
        )
    check_model_names(model)
    if type(model).forward is nn.Module.forward and "forward" not in model.__dict__:
        raise TraceError(f"{type(model).__name__} has no forward, so there is nothing to trace.")
    if has_backward_hooks(model):
        raise TraceError(
            f"{type(model).__name__} has backward hooks on the whole model, which a graph cannot carry. "
            "Remove them, regularize, and register them on the result."
        )


def _is_data(value: Any) -> bool:
    """Return whether an example input holds tensors or is an empty container. If so, it becomes an input of the graph."""
    if isinstance(value, (tuple, list, dict)):
        items = value.values() if isinstance(value, dict) else value
        return not value or any(map(_is_data, items))
    return bool(pytree.tree_tensors(value))


def _specialized(model: nn.Module, bound: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the specialized arguments by name, with their values.

    With an example, these are the arguments whose values are no data (``_is_data``), and those that the example leaves out and whose
    default is no tensor. Without one, they are the optional arguments whose default is no tensor, at their defaults. During the trace they
    are no proxies: a proxy instead of None would silently lead into the wrong branch.
    For a GraphModule, they are the arguments that were specialized when graphreg made the module.
    """
    if isinstance(model, fx.GraphModule):
        return specialized_arguments(model)
    if bound is not None:
        # ``bind`` fills in the default itself, so identity tells what the caller has left out
        left_out = {name for name, each in inspect.signature(model.forward).parameters.items() if bound[name] is each.default}
        fixed = {name for name in left_out if not isinstance(bound[name], torch.Tensor)}
        return {name: value for name, value in bound.items() if name in fixed or not _is_data(value)}
    optional = {n: p.default for n, p in inspect.signature(model.forward).parameters.items() if p.default is not p.empty}
    return {name: default for name, default in optional.items() if not isinstance(default, torch.Tensor)}
