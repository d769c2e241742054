"""Reads and writes graphreg's metadata of nodes: the labels of their values, and what graphreg did at the nodes.

``node.meta["site"]`` is (path of the module that made the value, labels), ``node.meta["graphreg"]``
is a dict of plain data, and ``node.meta["calls"]`` has the calls of submodules during which the
value was made; ``node.meta["caught"]`` names the errors of its operation that the model catches, and
``node.meta["draws"]`` the random operation whose value is no site.
All survive copying, pickling and passes that copy ``node.meta``. No other file accesses them,
except ``serialize.py``, which pickles them.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from torch import fx

from graphreg.ir.site import Label

SITE = "site"
ADDITION = "graphreg"
CALLS = "calls"
CAUGHT = "caught"
DRAWS = "draws"
# (path of a module, number of its call in the graph, from 0), outermost first
ModuleCalls = tuple[tuple[str, int], ...]
_UNNAMED: tuple[str, tuple[Label, ...]] = ("", ())


class Kind(StrEnum):
    """The purpose of a node that graphreg added or whose call it replaced."""

    KEY = "key"  # returns the noise keys of a call
    CLOCK = "clock"  # returns the strengths of a call that have a schedule
    # a native dropout that calls a runtime module now; the text is "own", because pickled graphs
    # contain it
    NATIVE = "own"
    SPLICE = "splice"  # replaces a value
    MEASURE = "measure"  # measures a value for a penalty
    TRACK = "track"  # makes autograd record a value that a derivative is taken with respect to
    # a copy of a splice's or track node's result; the model's operations read this copy and may
    # write into it
    CLONE = "clone"
    WHOLE = "whole"  # a tuple with a replaced value in place of one of its items
    COPY = "copy"  # a copy for penalties, made before the model writes into the value
    READ = "read"  # reads a parameter for a penalty
    TOTAL = "total"  # combines the measurements of a penalty at its sites
    ATTACH = "attach"  # joins the penalties to the outputs
    ATTACHED = "attached"  # an output that the penalties were joined to
    WATCH = "watch"  # measures a value for a monitor
    KEEP = "keep"  # joins the outputs of a cell's calls, which are kept as one sequence
    PARAMETER = "parameter"  # reads a parameter for the splices that replace it
    REPLACED = "replaced"  # the tensor that a node of the model reads instead of a parameter
    LAYER = "layer"  # fetches a layer that is called with replaced parameters
    CALL = "call"  # a call of a layer of the model, now with replaced parameters
    GRADIENTS = "gradients"  # switches gradients on or off around other nodes that graphreg added in a block of ``torch.no_grad``


@dataclass(frozen=True)
class Addition:
    """What graphreg did at a node.

    Attributes:
        kind: The node's purpose.
        regularizer: The name of the regularizer that the node is for; None if the node is not for
            exactly one regularizer.
        site: The name of the site that the node is for; None if the node is not for exactly one
            site.
        was: For a node of the model whose call graphreg replaced, the ``op`` and the ``target``
            that the node had before.
    """

    kind: Kind
    regularizer: str | None = None
    site: str | None = None
    was: tuple[str, Any] | None = None


def is_labelled(node: fx.Node) -> bool:
    """Return whether a front end recorded which module made the node's value, and the labels of the value."""
    return SITE in node.meta


def scope_of(node: fx.Node) -> str:
    """Return the path of the module that made the node's value; "" for the model itself, or if none was recorded."""
    scope: str = node.meta.get(SITE, _UNNAMED)[0]
    return scope


def own_labels(node: fx.Node) -> tuple[Label, ...]:
    """Return the labels of the node's value; () if it has none.

    A value that is an element of another node's tuple may have more labels, made from that tuple's
    labels: ``labels_of`` in ``roles.py`` returns these, too.
    """
    labels: tuple[Label, ...] = node.meta.get(SITE, _UNNAMED)[1]
    return labels


def own_name(node: fx.Node) -> str:
    """Return the name of the node's value; "" if it has none."""
    labels = own_labels(node)
    return labels[0].text if labels else ""


def draw_labels(node: fx.Node) -> tuple[Label, ...]:
    """Return the labels of a random operation: those of its value, or if the value is no site, a label for the operation alone."""
    labels: tuple[Label, ...] = own_labels(node) or node.meta.get(DRAWS, ())
    return labels or (Label(f"{scope_of(node)}.{node.name}".strip("."), node.name),)


def label_draw(node: fx.Node, label: Label) -> None:
    """Give a random operation a label by which it can be chosen as native dropout. Its value does not become a site."""
    node.meta[DRAWS] = (label,)


def label_site(node: fx.Node, scope: str, *labels: Label) -> None:
    """Record which module made the node's value, and the value's labels; a value without labels is no site."""
    node.meta[SITE] = (scope, labels)


def add_label(node: fx.Node, label: Label) -> None:
    """Give the node's value another label, unless the value has this label already."""
    if label not in own_labels(node):
        label_site(node, scope_of(node), *own_labels(node), label)


def place_beside(node: fx.Node, other: fx.Node, value: fx.Node) -> None:
    """Record that a node was made where ``other`` was, and that its value is like that of ``value``."""
    of_value = ("value", "val", "example_value", "tensor_meta")
    own = (SITE, ADDITION, CAUGHT, DRAWS, *of_value)
    node.meta |= {key: each for key, each in other.meta.items() if key not in own}
    node.meta |= {key: value.meta[key] for key in of_value if key in value.meta}


def labels_to_move(node: fx.Node, to: fx.Node) -> list[Label]:
    """Return the labels by which modules name a node as their output, though ``to``, made in the same calls, changes its value."""
    both, scope = {path for path, _ in _made_in(node) & _made_in(to)}, f"{scope_of(to)}."
    return [label for label in own_labels(node)[1:] if label.module in both and scope.startswith(f"{label.module}.")]


def _made_in(node: fx.Node) -> set[tuple[str, Any]]:
    """Return the calls of modules in which a node was made, or, before they have numbers, the tracer's own record of them."""
    calls = calls_of(node)
    return {(str(path), key) for key, (path, *_) in node.meta.get("nn_module_stack", {}).items()} if calls is None else set(calls)


def move_module_labels(node: fx.Node, to: fx.Node) -> None:
    """Give ``to`` those labels of ``node`` by which modules name their outputs, if ``to`` was made within the same calls."""
    if moved := labels_to_move(node, to):
        label_site(node, scope_of(node), *(label for label in own_labels(node) if label not in moved))
        for label in moved:
            add_label(to, label)


def calls_of(node: fx.Node) -> ModuleCalls | None:
    """Return the calls of submodules during which the node's value was made, outermost first; None if none were recorded."""
    calls: ModuleCalls | None = node.meta.get(CALLS)
    return calls


def surrounding_calls(node: fx.Node) -> ModuleCalls | None:
    """Return the calls of modules within which a node runs: ``calls_of`` without the call that the node itself is, or was before."""
    addition = addition_of(node)
    op, target = addition.was if addition is not None and addition.was is not None else (node.op, node.target)
    calls = calls_of(node)
    return calls[:-1] if op == "call_module" and calls and calls[-1][0] == target else calls


def record_calls(node: fx.Node, calls: ModuleCalls | None) -> None:
    """Record the calls of submodules during which the node's value was made; None records nothing."""
    if calls is not None:
        node.meta[CALLS] = calls


def addition_of(node: fx.Node) -> Addition | None:
    """Return what graphreg did at the node; None for an unchanged node of the model."""
    stored = node.meta.get(ADDITION)
    return None if stored is None else Addition(Kind(stored["kind"]), *map(stored.get, ("regularizer", "site", "was")))


def is_marked(node: fx.Node) -> bool:
    """Return whether graphreg added the node, or replaced its call."""
    return ADDITION in node.meta


def is_kind(node: fx.Node, *kinds: Kind) -> bool:
    """Return whether graphreg added the node, or replaced its call, for one of these purposes."""
    stored = node.meta.get(ADDITION)
    return stored is not None and stored["kind"] in kinds


def is_native_dropout(node: fx.Node) -> bool:
    """Return whether the node is a native dropout whose call graphreg replaced by a runtime module."""
    return is_kind(node, Kind.NATIVE)


def is_replaced_call(node: fx.Node) -> bool:
    """Return whether the node belongs to the model and graphreg replaced its call: a native dropout, or a call of a layer."""
    return is_kind(node, Kind.NATIVE, Kind.CALL)


def is_added(node: fx.Node) -> bool:
    """Return whether graphreg added the node. A node whose call it replaced counts as a node of the model."""
    return is_marked(node) and not is_replaced_call(node)


def mark(node: fx.Node, addition: Addition) -> None:
    """Record what graphreg did at the node."""
    optional = {"regularizer": addition.regularizer, "site": addition.site, "was": addition.was}
    node.meta[ADDITION] = {"kind": addition.kind.value} | {name: value for name, value in optional.items() if value is not None}


def unmark(node: fx.Node) -> Addition:
    """Remove the record of what graphreg did at the node, and return it."""
    addition = addition_of(node)
    assert addition is not None
    del node.meta[ADDITION]
    return addition


def mark_caught(node: fx.Node, errors: tuple[str, ...]) -> None:
    """Note which errors that the operation of a node may raise the model's code catches, by the names of their classes."""
    node.meta[CAUGHT] = errors


def caught_errors(graph: fx.Graph) -> frozenset[str]:
    """Return which errors the model's code catches, by the names of their classes: it then goes another way than its graph."""
    return frozenset(name for node in graph.nodes for name in node.meta.get(CAUGHT, ()))


def may_be_caught(node: fx.Node) -> bool:
    """Return whether the model's code may catch what the operation of a node raises."""
    return CAUGHT in node.meta
