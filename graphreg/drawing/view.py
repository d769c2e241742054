"""Finds the graph to draw, given a model, a trace, a plan or a rewritten module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from torch import fx, nn

from graphreg.errors import GraphRegError
from graphreg.ir.random_ops import NativeDropout
from graphreg.ir.site import Site
from graphreg.planning.plan import Plan
from graphreg.planning.repeats import Strengths
from graphreg.rewriting.rewrite import rewrite
from graphreg.rewriting.strip import without_additions
from graphreg.session.controls import strengths_now
from graphreg.session.hosts import backend_host, graphs_of, in_place_host, record_of, rewritten
from graphreg.tracing.listing import trace_to_show
from graphreg.tracing.trace import Traced, trace

Mode = Literal["train", "eval"]
Drawable = nn.Module | Traced | Plan


@dataclass(frozen=True)
class Viewed:
    """A graph to draw, with the trace and the plan that it comes from.

    Attributes:
        traced: The trace of the model without regularizers.
        graph: The graph to draw, with the additions of the regularizers.
        forward: Which forward the graph shows: ``"train"`` or ``"eval"``, or ``"both"`` if one graph serves both modes.
        plan: The plan that was applied, or None.
        strengths: The present strength of each regularizer, by name; if it differs by site, also by (name, site).
        against: The graph of the same model that this one is compared with, or None.
        readings: What a monitor has read, for a page; None if there is nothing to show.
    """

    traced: Traced
    graph: fx.Graph
    forward: str
    plan: Plan | None
    strengths: Strengths
    against: Viewed | None = None
    readings: Sequence[Mapping[str, Any]] | None = None

    @property
    def title(self) -> str:
        """The model's name."""
        return self.plan.title if self.plan else self.traced.title

    @property
    def heading(self) -> str:
        """The title, with the mode if the two forwards differ."""
        return self.title if self.forward == "both" else f"{self.title}, in {self.forward} mode"

    @cached_property
    def sites(self) -> dict[str, Site]:
        """The model's sites by name."""
        return {site.name: site for site in self.traced.sites}

    @cached_property
    def native_dropout(self) -> dict[str, NativeDropout]:
        """The model's native dropouts by the names of their sites."""
        return {dropout.site.name: dropout for dropout in self.traced.native_dropout}


def viewed(target: Drawable, plan: Plan | None = None, example_inputs: Any = None, mode: Mode = "train") -> Viewed:
    """Find the graph of a model, a trace, a plan or a rewritten module. A plan is applied to a copy of the graph.

    Args:
        target: A model, a trace, a plan, or a rewritten module. For a plan, the graph is that of the plan's trace, with the plan applied.
        plan: With a model or a trace: the plan to apply.
        example_inputs: With a model: example inputs, as in ``trace``.
        mode: Which forward, if the two differ.

    Raises:
        GraphRegError: What was given has no graph, the mode is unknown, two plans are given, or the plan is for another model.
    """
    if mode not in ("train", "eval"):
        raise GraphRegError(f"mode={mode!r} is unknown; give 'train' or 'eval', the forward to draw where the two differ.")

    if isinstance(target, Plan):
        if plan is not None:
            raise GraphRegError("two plans are given. Give one of them, or a model or trace together with plan=.")
        if target.traced is None:
            raise GraphRegError(f"this plan for {target.title} has no traced model with it. Give the trace, and the plan as plan=.")
        _refuse(example_inputs, "a plan")
        return _traced(target.traced, target, mode)

    if plan is not None and not isinstance(plan, Plan):
        raise GraphRegError(f"plan= takes what graphreg.plan gives, not {type(plan).__name__}.")
    if backend_host(target) is not None:
        raise GraphRegError(
            "a backend has several graphs, and they belong to torch.compile. graphreg.report shows them; to see the model as one "
            "graph, give the model itself, or what graphreg.regularize makes of it."
        )

    if isinstance(target, Traced):
        _refuse(example_inputs, "a trace")
        return _traced(target, plan, mode)

    if not isinstance(target, nn.Module):
        raise GraphRegError(f"{type(target).__name__} has no graph. Give a model, what graphreg.trace gives, or what regularize returned.")

    module = _rewritten(target)
    if module is None:
        return _traced(trace_to_show(target, example_inputs), plan, mode)
    _refuse(example_inputs, "a rewritten module")
    if plan is not None:
        raise GraphRegError(
            "this module is rewritten already, and plan= goes with a model or a trace that is not rewritten. Give "
            "graphreg.trace(graphreg.strip(module)) with plan=."
        )
    # The sites are those of the model, and the graph has the additions, too.
    return _viewed(trace(without_additions(module)), graphs_of(module), record_of(module).plan, strengths_now(module), mode)


def _refuse(example_inputs: Any, what: str) -> None:
    if example_inputs is not None:
        raise GraphRegError(f"example_inputs= is for a model that is not traced yet; {what} knows what it was traced with. Leave it out.")


def _traced(traced: Traced, plan: Plan | None, mode: Mode) -> Viewed:
    if plan is None:
        return _viewed(traced, traced.graphs, None, {}, mode)
    module = rewrite(traced, plan, rng=0)  # a seed, so that no draw is taken from the user's generator
    return _viewed(traced, graphs_of(module), plan, strengths_now(module), mode)


def _viewed(traced: Traced, graphs: Mapping[str, fx.Graph], plan: Plan | None, now: Strengths, mode: Mode) -> Viewed:
    name = "both" if "both" in graphs else mode
    return Viewed(traced, graphs[name], name, plan, now)


def _rewritten(module: nn.Module) -> fx.GraphModule | None:
    """Return the rewritten module in ``module``, which torch may have wrapped (torch.compile, DDP); None if there is none.

    For a model that is regularized in place, this is the rewritten module of the model's last call.
    """
    if (placed := in_place_host(module)) is not None:
        return placed.current()
    try:
        return rewritten(module)
    except GraphRegError:
        return None
