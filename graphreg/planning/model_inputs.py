"""Checks that the inputs of the model which a regularizer's options name exist, as far as the trace shows them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from graphreg.errors import NoMatchError, RegularizerError, shown, suggestions_text
from graphreg.ir.site import Site
from graphreg.ir.time_steps import Steps
from graphreg.regularizer.base import Regularizer
from graphreg.regularizer.sequences import check_lengths
from graphreg.tracing.trace import Traced


def check_model_inputs(traced: Traced, regularizer: Regularizer, chosen: Mapping[Site, tuple[str, Steps | None]]) -> None:
    """Check that each input that an option names is one of the model, and, as far as it is known, a tensor; check the shape of lengths.

    Args:
        traced: The traced model.
        regularizer: The regularizer.
        chosen: The selected sites, each with the string that matched it and how its value is read
            as a sequence.

    Raises:
        NoMatchError: There is no input of this name.
        RegularizerError: An input is no tensor, or, for lengths, of another shape or dtype than the
            sequences need.
    """
    nodes = {str(n.target): n for graph in traced.graphs.values() for n in graph.nodes if n.op == "placeholder"}
    # The graph fixes a specialized argument at its value, and does not take it as an input.
    inputs = {name: node.meta.get("value") for name, node in nodes.items() if name not in traced.specialized}
    for option, name in regularizer.model_inputs.items():
        who = f"{type(regularizer).__name__}: {option}={name!r}"
        if name not in inputs:
            raise NoMatchError(f"{who}: {_why_not(name, traced, inputs)}")
        if isinstance(inputs[name], list):
            raise RegularizerError(f"{who}: {name!r} holds several values, and the formula takes one tensor. Name an input that is one.")
        if option == "lengths":
            read_as = {site: (text, steps) for site, (text, steps) in chosen.items() if steps is not None}
            check_lengths(read_as, inputs[name], type(regularizer).__name__)


def _why_not(name: str, traced: Traced, inputs: Mapping[str, Any]) -> str:
    """Return a sentence that says why a model has no input of this name, and what to do."""
    if name in traced.specialized:
        return (
            f"{name!r} is an argument that is specialized to {shown(traced.specialized[name])}: give example_inputs that carry a tensor "
            "for it. If the model is regularized in place, call it with a tensor for it."
        )
    if traced.front_end == "dynamo" and name in inspect.signature(traced.model.forward).parameters:
        return (
            f"{name!r} is an argument of the model, but the graph in which the regularizer acts does not get it. torch.compile gives a "
            "graph only those arguments that the graph itself reads, and only the first graph of a call has arguments of the model. Use "
            "graphreg.regularize or graphreg.regularize_, or select sites of a graph that reads the argument."
        )
    return f"no input of the model has that name.{suggestions_text(name, inputs)} Inputs: {', '.join(inputs) or 'none'}."
