"""What graphreg writes to the nodes of a graph: the names of their values, and which nodes were added. Read and written here alone.

The stored form is plain data: ``node.meta["site"]`` is (path of the module, labels), ``node.meta["graphreg"]`` a dict. It survives
copying, pickling and passes that copy ``node.meta``, and a front end of somebody else's may write it without graphreg.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from torch import fx

from graphreg.ir.site import Label

SITE = "site"
ADDITION = "graphreg"
_UNNAMED: tuple[str, tuple[Label, ...]] = ("", ())


class Kind(StrEnum):
    """What a node that graphreg added, or whose call it replaced, is there for."""

    KEY = "key"  # gives the keys of the noise of a call
    NATIVE = "own"  # a native dropout, which calls a runtime module in place of what it called; pickled graphs have this value
    SPLICE = "splice"  # replaces a value
    MEASURE = "measure"  # measures a value for a penalty
    TRACK = "track"  # a value that a derivative is taken with respect to
    CLONE = "clone"  # a copy that the model's operations read, and may write into
    COPY = "copy"  # a copy that penalties read, before the model writes into the value
    READ = "read"  # reads a parameter
    TOTAL = "total"  # the penalty, over its sites
    ATTACH = "attach"  # joins the penalties to the outputs
    ATTACHED = "attached"  # an output, with the penalties joined to it
    WATCH = "watch"  # measures a value for a monitor


@dataclass(frozen=True)
class Addition:
    """What graphreg did at a node: for which regularizer and at which site, where it is for one.

    ``was``: of a native dropout, the operation and the target that the node called.
    """

    kind: Kind
    regularizer: str | None = None
    site: str | None = None
    was: tuple[str, Any] | None = None


def is_labelled(node: fx.Node) -> bool:
    """Whether a front end has said which module made the node's value, and how that is called."""
    return SITE in node.meta


def scope_of(node: fx.Node) -> str:
    """The path of the module that made the node's value; "" for the model itself, and where nobody has said."""
    scope: str = node.meta.get(SITE, _UNNAMED)[0]
    return scope


def own_labels(node: fx.Node) -> tuple[Label, ...]:
    """The labels of the node's value, without those that it has as a port of another; none for what is no site."""
    labels: tuple[Label, ...] = node.meta.get(SITE, _UNNAMED)[1]
    return labels


def own_name(node: fx.Node) -> str:
    """The name of the node's value; "" where it has none."""
    labels = own_labels(node)
    return labels[0].text if labels else ""


def label_site(node: fx.Node, scope: str, *labels: Label) -> None:
    """Write which module made the node's value, and its labels; without labels it is no site."""
    node.meta[SITE] = (scope, labels)


def add_label(node: fx.Node, label: Label) -> None:
    """Give the node's value one name more."""
    if label not in own_labels(node):
        label_site(node, scope_of(node), *own_labels(node), label)


def addition_of(node: fx.Node) -> Addition | None:
    """What graphreg did at the node; None for a node of the model as it was."""
    stored = node.meta.get(ADDITION)
    return None if stored is None else Addition(Kind(stored["kind"]), *map(stored.get, ("regularizer", "site", "was")))


def is_marked(node: fx.Node) -> bool:
    """Whether graphreg added the node, or replaced what it called."""
    return ADDITION in node.meta


def is_kind(node: fx.Node, *kinds: Kind) -> bool:
    """Whether graphreg added the node for one of these."""
    stored = node.meta.get(ADDITION)
    return stored is not None and stored["kind"] in kinds


def is_native_dropout(node: fx.Node) -> bool:
    """Whether a runtime module stands in the place of a native dropout's call."""
    return is_kind(node, Kind.NATIVE)


def is_added(node: fx.Node) -> bool:
    """Whether graphreg added the node. A native dropout that it replaced is the model's own node."""
    return is_marked(node) and not is_native_dropout(node)


def mark(node: fx.Node, addition: Addition) -> None:
    """Write what graphreg did at the node."""
    optional = {"regularizer": addition.regularizer, "site": addition.site, "was": addition.was}
    node.meta[ADDITION] = {"kind": addition.kind.value} | {name: value for name, value in optional.items() if value is not None}


def unmark(node: fx.Node) -> Addition:
    """Take the mark off again; gives what it said."""
    addition = addition_of(node)
    assert addition is not None
    del node.meta[ADDITION]
    return addition
