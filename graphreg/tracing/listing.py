"""``names`` lists the sites of a model. Traces that are only looked at use the inputs that the model's library gives."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from graphreg.errors import GraphRegError, check_flag, shown
from graphreg.ir.selector import Selector, select, strings
from graphreg.ir.shape_guards import fixed
from graphreg.ir.site import READS_PARAMETER, Names, Site
from graphreg.ir.source_function import SourceFunction
from graphreg.ir.source_listing import source_listing
from graphreg.regularizer.base import On
from graphreg.torch_internals.interpreter import collector_at_rest
from graphreg.torch_internals.patching import raise_interrupt
from graphreg.tracing.dynamo_graphs import CapturedGraphs, captured_by
from graphreg.tracing.shape_decisions import decisions
from graphreg.tracing.trace import FrontEnd, Traced, trace


def trace_to_show(model: nn.Module, example_inputs: Any = None, front_end: FrontEnd = "auto") -> Traced:
    """Trace a model to list or draw it. Without example inputs, use those that its library gives, if the model runs on them.

    A module that is trained should not be made from such a trace, because its arguments are fixed
    to those of the library's inputs.
    """
    usual = usual_inputs(model) if example_inputs is None else None
    if usual is not None:
        inputs, what = usual
        try:
            # these inputs may be large, and nothing is trained with the graph
            traced = trace(model, inputs, front_end, prove=False)
        except Exception as error:
            # the model may be built for other inputs, and then fails in its own way
            raise_interrupt(error)
        else:
            return replace(traced, notes=(*traced.notes, f"example inputs: {what}"), unproved={})
    return trace(model, example_inputs, front_end)


def usual_inputs(model: nn.Module) -> tuple[Any, str] | None:
    """Return the inputs that a model's library gives for it, and where they are from; None if there are none that its forward takes.

    They are ``model.dummy_inputs`` of transformers, and a tensor of the size in
    ``model.default_cfg`` of timm.
    """
    try:
        dummy, config = getattr(model, "dummy_inputs", None), getattr(model, "default_cfg", None)
        accepted = inspect.signature(model.forward).parameters
    except Exception as error:  # dummy_inputs is a property with code of its own
        raise_interrupt(error)
        return None
    known = isinstance(dummy, Mapping) and bool(dummy) and accepted.keys() >= dummy.keys()
    if isinstance(dummy, Mapping) and known and all(isinstance(value, torch.Tensor) for value in dummy.values()):
        shapes = ", ".join(f"{name} {'x'.join(map(str, value.shape))}" for name, value in dummy.items())
        return dict(dummy), f"model.dummy_inputs ({shapes})"
    size = config.get("input_size") if isinstance(config, Mapping) else None
    if isinstance(size, Sequence) and size and all(type(side) is int and side > 0 for side in size):
        return torch.zeros(2, *size), f"model.default_cfg (2x{'x'.join(map(str, size))})"
    return None


@collector_at_rest()
def names(
    model_or_traced: nn.Module | Traced | CapturedGraphs,
    example_inputs: Any = None,
    front_end: FrontEnd = "auto",
    *,
    backend: CapturedGraphs | None = None,
    select: Selector | None = None,
    on: On | None = None,
    all: bool = False,
    source: bool = False,
) -> Names:
    """List the sites of a model with name, op, shape, dtype and role.

    Args:
        model_or_traced: The model, or a trace of it; or what ``torch.compile`` made of a model with
            a backend of graphreg's, or this
            backend: then, the sites of the graphs that were captured so far.
        example_inputs: As in ``trace``. Without them, a model of transformers is traced with its
            ``dummy_inputs``, and a model of timm with the input size in its ``default_cfg``.
        front_end: As in ``trace``.
        backend: With ``graphreg.backend()``, list the sites of the graphs that torch.compile
            captures in one call of a copy of the model with the example inputs, in the mode in
            which the model is.
        select: List only the sites that this selector selects: a string, several strings, or a
            function of a site. A lone ``"*"`` means the hidden values; with ``on="parameters"``,
            all parameters.
        on: With ``select``: select only among ``"values"`` or only among ``"parameters"``.
        all: List also values that are not tensors, such as sizes. No regularizer can act on them.
        source: Print the model's own code instead of the table: each function that ran, line by line,
            with the sites that each line makes beside it. A terminal shows it in colours if rich is
            installed.

    Returns:
        A listing that prints as a table, or as code, and iterates over names.

    Raises:
        TraceError: The model cannot be traced.
        NoMatchError: ``select`` selects nothing.
        GraphRegError: An option is not allowed.
    """
    if on not in (None, "values", "parameters"):
        raise GraphRegError(f"on={shown(on)} is unknown; give 'values' or 'parameters', or leave it out.")
    if on is not None and select is None:
        raise GraphRegError("on= limits what select= can select; give select=, too.")
    check_flag("source", source)
    traced = _traced(model_or_traced, example_inputs, front_end, backend)
    known = _listing(traced, all) if select is None else _selected(traced, select, on)
    if not source:
        return known
    functions = source_of(traced, known.sites)
    if select is not None:
        functions = tuple(function for function in functions if any(line.sites for line in function.lines))
    return Names(known.title, known.sites, known.notes, functions)


def source_of(traced: Traced, sites: Iterable[Site]) -> tuple[SourceFunction, ...]:
    """List the model's own code, with the names of those of the given sites that each line makes."""
    made = {name for site in sites if site.kind == "value" and site.why_not != READS_PARAMETER for name in site.names}
    return source_listing(traced.model, tuple(traced.graphs.values()), traced.operations, made)


def _listing(traced: Traced, all: bool) -> Names:
    notes = [f"opaque module: {path} ({reason})" for path, reason in traced.opaque_modules.items()]
    how = "to trace it, give example_inputs that include it"
    notes += [f"specialized argument: {name}={value!r} ({how})" for name, value in traced.specialized.items()]
    notes += [*traced.notes, *decisions(next(iter(traced.graphs.values()))), *fixed(next(iter(traced.graphs.values())))]
    notes += [f"native dropout: {dropout.text}" for dropout in traced.native_dropout]
    parameters = {site.name for site in traced.parameters}
    # A parameter and the value that the forward reads from the parameter share one line.
    known = [site for site in traced.sites if site.kind == "parameter" or site.why_not != READS_PARAMETER or site.name not in parameters]
    listed = known if all else [site for site in known if site.why_not != NO_TENSOR]
    if len(listed) < len(known):
        notes.insert(0, f"not listed: {len(known) - len(listed)} values that are no tensors, such as sizes (all=True lists them)")
    return Names(traced.title, listed, notes)


def _traced(target: Any, example_inputs: Any, front_end: FrontEnd, backend: Any) -> Traced:
    if backend is not None and (not isinstance(backend, CapturedGraphs) or not isinstance(target, nn.Module)):
        raise GraphRegError(
            "backend= is for what torch.compile captures of a model: graphreg.names(model, backend=graphreg.backend(), ...)."
        )
    if isinstance(target, Traced):
        return target
    if (captured := backend or captured_by(target)) is None:
        return trace_to_show(target, example_inputs, front_end)
    if example_inputs is None and backend is None:
        return captured.traced()
    return captured.traced_on(target, example_inputs)


NO_TENSOR = "no tensor"  # ``Site.why_not`` of sizes and the like


def _selected(traced: Traced, selector: Selector, on: On | None) -> Names:
    sites: Sequence[Site] = {"values": traced.values, "parameters": traced.parameters, None: traced.sites}[on]
    usual = [site for site in sites if site.selectable and (on == "parameters" or site.role == "hidden")]
    matches = select(
        selector, sites, usual, what=(on or "sites")[:-1], model=traced.title, who="select",
        usual="the parameters" if on == "parameters" else "the hidden values", elsewhere=traced.sites,
    )  # fmt: skip
    asked = strings(selector) or (getattr(selector, "__name__", type(selector).__name__),)
    return Names(f"{traced.title}, {' '.join(map(repr, asked))}", tuple(matches))
