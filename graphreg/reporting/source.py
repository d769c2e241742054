"""Splits the emitted Python of a module into lines, each with the regularizers and sites that it belongs to. ``diff`` compares the lines.

The statements with which torch.fx frees values (``; x = None``) are left out, because each addition moves them to other lines.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx

from graphreg.ir.metadata import Addition, Kind, addition_of
from graphreg.ir.module_record import RULES
from graphreg.planning.native_dropout import OWN_DROPOUT
from graphreg.planning.plan import Plan
from graphreg.planning.repeats import Strengths
from graphreg.regularizer.base import Penalty, Splice
from graphreg.reporting.entries import options_of, selector_of
from graphreg.runtime.attach import AttachRule
from graphreg.runtime.result import Kept, Regularized
from graphreg.runtime.rewritten_module import RewrittenModule
from graphreg.session.hosts import graphs_of, record_of, rewritten, rules_of
from graphreg.session.strengths import strength_text

# ``;  relu = None`` at the end of a line, or ``;  relu = linear = None``
_FREES = re.compile(r";  (?:\w+ = )+None$")
# ``linear = ...`` at the start of a line or after a semicolon, also with an annotation
_ASSIGNS = re.compile(r"(?:^ *|;  )(\w+)(?: : [^=]+)? = ")
_REPLACES = (Kind.SPLICE, Kind.CLONE, Kind.TRACK, Kind.REPLACED)


@dataclass(frozen=True)
class Line:
    """A line of emitted code.

    Attributes:
        code: The Python, or a comment that takes the whole line.
        key: The name that the line assigns, or a text such as ``"return"``. ``diff`` pairs lines of two sources that have the same key.
        kind: For a line that graphreg added, the kind of addition, as in ``node.meta["graphreg"]``. ``"reads"`` for a line of the model
            that reads an addition. ``"rule"`` for a comment that describes a regularizer. ``""`` for any other line of the model.
        regularizers: The names of the regularizers that the line belongs to.
        sites: The names of the sites that the line belongs to.
        comment: The comment to print after the code. It says which regularizers and sites the line serves.
    """

    code: str
    key: str
    kind: str = ""
    regularizers: tuple[str, ...] = ()
    sites: tuple[str, ...] = ()
    comment: str = ""


@dataclass(frozen=True)
class Source:
    """The title of a module and the lines of its ``forward`` methods, by mode: ``both``, or ``train`` and ``eval``."""

    title: str
    forwards: Mapping[str, tuple[Line, ...]]


def source(module: Any, strengths: Strengths) -> Source:
    """Return the source of a rewritten module, which may be inside wrappers, or of a stripped module.

    ``strengths``: the present strengths, for the comments about regularizers; a stripped module has none. Raises GraphRegError if
    ``module`` is an object of another kind.
    """
    if isinstance(module, RewrittenModule) and RULES not in module._modules:
        return Source(type(module).__name__, {mode: tuple(_lines(graph, None)) for mode, graph in graphs_of(module).items()})
    inner, plan = rewritten(module), record_of(module).plan
    rules = _rules(plan, strengths)
    attached = rules_of(module)._modules.get("attach")
    if isinstance(attached, AttachRule) and attached.describe_scale() != "scale 1":
        rules.append(Line(f"# attach: {attached.describe_scale()}", "# attach", "rule", attached.names))
    return Source(plan.title, {mode: (*rules, *_lines(graph, plan)) for mode, graph in graphs_of(inner).items()})


def _rules(plan: Plan, strengths: Strengths) -> list[Line]:
    """Return a comment line for each regularizer, with its strength and options, and one for each action of ``own_dropout=``."""
    lines = []
    for name, regularizer in plan.regularizers.items():
        options = "".join(f", {option}={value!r}" for option, value in options_of(regularizer).items())
        where = ", ".join(map(repr, selector_of(regularizer)))
        schedule = f" now, {regularizer.weight!r}," if regularizer.is_scheduled else ""
        text = f"# {name}: {type(regularizer).__name__} {strength_text(name, strengths)}{schedule} on {where}{options}"
        lines.append(Line(text, f"# {name}", "rule", (name,)))
    for action in dict.fromkeys(edit.action for edit in plan.native_dropout):
        sites = tuple(edit.dropout.site.name for edit in plan.native_dropout if edit.action == action)
        lines.append(Line(f"# {OWN_DROPOUT} {action}: {', '.join(sites)}", f"# {OWN_DROPOUT} {action}", "rule", (OWN_DROPOUT,), sites))
    return lines


def _lines(graph: fx.Graph, plan: Plan | None) -> list[Line]:
    nodes = {node.name: node for node in graph.nodes}
    lines = []
    for text in graph.python_code("self").src.splitlines():
        code = _FREES.sub("", text.rstrip())
        made = [name for name in _ASSIGNS.findall(code) if name in nodes]
        if code.lstrip().startswith("return "):
            lines.append(_line(code, "return", graph.output_node(), plan))
        elif made:
            lines.append(_line(code, made[-1], nodes[made[-1]], plan))
        elif code:
            lines.append(Line(code, code.partition("(")[0]))
    return lines


def _line(code: str, key: str, node: fx.Node, plan: Plan | None) -> Line:
    """Make the ``Line`` for the code of a node, with the regularizers and sites that it belongs to."""
    if plan is None:
        return Line(code, key)
    # Kind.CALL marks the model's own call of a layer, now with replaced parameters. The code below describes this call by "reads ...".
    if (addition := addition_of(node)) is not None and addition.kind != Kind.CALL:
        return _added(code, key, node, addition, plan)
    replaced = dict.fromkeys(pair for source in node.all_input_nodes for pair in _replacing(source, plan))
    names, sites = tuple(dict.fromkeys(name for name, _ in replaced)), tuple(dict.fromkeys(site for _, site in replaced))
    comments = [f"reads {' and '.join(f'{name} at {site}' for name, site in replaced)}"] if replaced else []
    returned: tuple[str, ...] = ()
    if key == "return" and isinstance(result := node.args[0], (Regularized, Kept)):
        returned = tuple(result.penalties)
        comments.append(f"returns {', '.join(returned) or 'no penalty'}")
        if isinstance(result, Kept):
            comments.append(f"keeps {', '.join(result.values) or 'none of its values'}")
    return Line(code, key, "reads" if comments else "", (*names, *returned), sites, "; ".join(comments))


def _replacing(node: fx.Node, plan: Plan) -> list[tuple[str, str]]:
    """If a node's result stands in the place of a value of the model, return for which regularizers: pairs (regularizer, site).

    Return an empty list for any other node.
    """
    addition = addition_of(node)
    if addition is None:
        return []
    if addition.kind == Kind.ATTACHED:
        return [(name, "the output") for name in plan.penalties]
    # The node puts the result of a splice in the place of the value.
    if addition.kind == Kind.REPLACED and isinstance(splice := node.args[1], fx.Node):
        return _replacing(splice, plan)
    return [(name, addition.site or "") for name in _names(addition, plan)] if addition.kind in _REPLACES else []


def _names(addition: Addition, plan: Plan) -> list[str]:
    """Return the names of the regularizers that an addition serves."""
    kind, site = addition.kind, addition.site or ""
    if addition.regularizer is not None:
        return [addition.regularizer]
    if kind in (Kind.NATIVE, Kind.WATCH):
        return [OWN_DROPOUT if kind == Kind.NATIVE else "monitor"]
    if kind == Kind.KEY:
        drawing = [name for name, r in plan.regularizers.items() if isinstance(r, Splice) or name in plan.slices]
        return [*drawing, *([OWN_DROPOUT] if any(edit.draws for edit in plan.native_dropout) else [])]
    if kind == Kind.CLOCK:
        scheduled = [name for name, r in plan.regularizers.items() if r.is_scheduled]
        return [*scheduled, *([OWN_DROPOUT] if any(edit.is_scheduled for edit in plan.native_dropout) else [])]
    if kind == Kind.TRACK:
        return plan.tracked[site]
    if kind in (Kind.ATTACH, Kind.ATTACHED):
        return plan.penalties
    if kind == Kind.PARAMETER:
        return [edit.name for edit in plan.edits if edit.replaces_parameter and edit.site.name == site]
    # A copy of a value serves all that acts at its site.
    return [*dict.fromkeys([*plan.tracked.get(site, ()), *(edit.name for edit in plan.by_site.get(site, ()))])]


def _added(code: str, key: str, node: fx.Node, addition: Addition, plan: Plan) -> Line:
    kind = addition.kind
    names = [name for name, _ in _replacing(node, plan)] if kind == Kind.REPLACED else _names(addition, plan)
    listed = ", ".join(names)
    sites: tuple[str, ...] = (addition.site,) if addition.site is not None else ()

    if kind == Kind.TOTAL and isinstance(plan.regularizers[names[0]], Splice):
        sites = tuple(edit.site.name for edit in plan.of(names[0]))
        text = f"{listed}: the penalty of what it learns at {sites[0] if len(sites) == 1 else f'{len(sites)} sites'}"
    elif kind == Kind.TOTAL and not (node.args and node.args[0]):
        text = f"{listed}: 0, for none of its sites is in this forward"
    elif kind == Kind.TOTAL:
        measured = node.args[0] if isinstance(node.args[0], dict) else node.args  # a dict by site, if the penalty takes all sites at once
        sites = tuple(edit.site.name for edit in plan.of(names[0]))
        text = f"{listed} at {sites[0]}" if len(sites) == 1 else f"{listed} over {len(measured)} sites"
    elif kind == Kind.KEY:
        text = f"draws of {listed}"
    elif kind == Kind.CLOCK:
        text = f"schedules of {listed}"
    elif kind in (Kind.ATTACH, Kind.ATTACHED):
        text = f"{listed} attached to the output"
    elif kind in (Kind.CLONE, Kind.COPY):
        text = f"copy for {listed or 'keep='} at {sites[0]}: the model writes into it"
    elif kind == Kind.GRADIENTS:
        text = "gradients as outside of torch.no_grad, for what graphreg adds within"
    elif kind == Kind.KEEP:
        text = f"keeps the calls of {sites[0]} as one sequence"
    elif kind == Kind.WATCH:
        text = f"{listed} at {sites[0] or 'the penalties'}"
    elif kind == Kind.TRACK:
        text = f"{listed} with respect to {sites[0]}"
    elif kind == Kind.LAYER:
        text = f"the layer {node.target}, to be called with what replaces its parameters"
    elif kind == Kind.NATIVE:
        text = f"{listed} at {sites[0]}: {next(edit.action for edit in plan.native_dropout if edit.dropout.site.name == sites[0])}"
    else:
        penalty = plan.regularizers[names[0]] if kind == Kind.MEASURE else None
        clean = isinstance(penalty, Penalty) and penalty.clean
        text = f"{listed} at {sites[0]}" + ", before it is replaced" * clean

    return Line(code, key, kind.value, tuple(names), sites, text)
