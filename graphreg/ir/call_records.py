"""What the calls of submodules took and returned, for hooks: a graph contains the operations of such a call, and not the call.

A front end gives each graph a ``CallRecord`` for each call, in the metadata of its output node. The records are plain data, with the names
of nodes in place of values.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from graphreg.ir.source_location import Origin
from graphreg.torch_internals import pytree

CALL_RECORDS = "call_records"
_PLAIN = (
    int, float, complex, bool, str, bytes, type(None), type(...), torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size,
)  # fmt: skip


@dataclass(frozen=True)
class Leaf:
    """An element of what a call took or returned. At most one attribute is set.

    Attributes:
        node: The name of the node that has its value.
        read: The path of the model's buffer or parameter that it is, if no node reads that.
        plain: The element itself, if it is a number, a string or the like.
        kind: What it is, for an error, if it is nothing of these.
    """

    node: str = ""
    read: str = ""
    plain: Any = None
    kind: str = ""


@dataclass(frozen=True)
class CallRecord:
    """A call of a submodule. Inputs and output are nested containers; their elements are leaves once the graph is made.

    Attributes:
        inputs: The pair of the arguments and the keyword arguments.
        output: The result.
        origin: The line of the user's code that made the call; None if it is not known.
    """

    inputs: Any
    output: Any
    origin: Origin | None = None

    def __reduce__(self) -> tuple[type[CallRecord], tuple[Any, Any]]:
        # by the time a pickle is read, the file may have changed
        return CallRecord, (self.inputs, self.output)

    def map(self, function: Callable[[Any], Any]) -> CallRecord:
        """Return the record with the results of a function in place of the elements."""
        return CallRecord(in_containers(self.inputs, function), in_containers(self.output, function), self.origin)


def in_containers(value: Any, function: Callable[[Any], Any]) -> Any:
    """Return new containers like those in a value, with the results of a function in place of their elements."""
    leaves, structure = pytree.tree_flatten(value, is_leaf=_is_element)
    return pytree.tree_unflatten(list(map(function, leaves)), structure)


def _is_element(value: Any) -> bool:
    """Return whether a value is no container, or one that pickle could not write."""
    kind = type(value)
    if kind in (tuple, list):
        return False
    if kind in (dict, OrderedDict):
        return not all(isinstance(key, (str, int)) for key in value)
    return kind not in pytree.SUPPORTED_NODES or getattr(sys.modules.get(kind.__module__), kind.__qualname__, None) is not kind


def replaced_leaf(_: Any) -> Leaf:
    """Return the leaf for an argument of a module whose own pre-hooks may replace it: they are a part of the graph, and run first."""
    return Leaf(kind="an argument that a hook of the model's own may replace")


def call_key(path: str, key: str) -> str:
    """Return a key for a call of the module at a path. ``key``: the tracer's, which ends with ``@`` and a number unless it is the first."""
    number = key.rpartition("@")[2]
    return f"{path}@{int(number) if '@' in key and number.isdecimal() else 0}"


def record_module_calls(graph: fx.Graph, records: Iterable[tuple[str, CallRecord]]) -> None:
    """Give a graph the records of calls, by their ``call_key``. Elements are nodes of the graph, or anything else."""
    kept = set(graph.nodes)

    def leaf(value: Any) -> Leaf:
        if isinstance(value, Leaf):
            return value
        if isinstance(value, fx.Node) and value in kept:
            return Leaf(value.name)
        if isinstance(value, fx.Node):
            # a node that reads state may be gone as unread; a constant of torch.fx is no state
            is_state = value.op == "get_attr" and not str(value.target).startswith("_tensor_constant")
            return Leaf(read=str(value.target)) if is_state else Leaf(kind="a value that the graph does not have")
        return Leaf(plain=value) if isinstance(value, _PLAIN) else Leaf(kind=f"a {type(value).__name__}")

    graph.output_node().meta[CALL_RECORDS] = {key: record.map(leaf) for key, record in records}


def recorded_calls(graph: fx.Graph) -> Mapping[tuple[str, int], CallRecord]:
    """Return the records of the calls in a graph, by the path of the module and the number of its call."""
    records: Mapping[tuple[str, int], CallRecord] = graph.output_node().meta.get(CALL_RECORDS, {})
    return records


def rename_in_calls(graph: fx.Graph, names: Mapping[str, str]) -> None:
    """Follow new names of nodes in the records of a graph's calls."""

    def renamed(leaf: Leaf) -> Leaf:
        return replace(leaf, node=names[leaf.node]) if leaf.node in names else leaf

    if names and (records := recorded_calls(graph)):
        graph.output_node().meta[CALL_RECORDS] = {call: record.map(renamed) for call, record in records.items()}


def doubt_plain(graph: fx.Graph, other: fx.Graph | None) -> None:
    """Mark the plain elements in the records of a graph for both modes that depend on the mode, because a hook must not get a wrong one.

    ``other``: the graph of the other mode; None if the model was not traced in it. Then each True may be a mode that the model passes on.
    """
    records: Mapping[Any, CallRecord] = graph.output_node().meta.get(CALL_RECORDS, {})
    others: Mapping[Any, CallRecord] = other.output_node().meta.get(CALL_RECORDS, {}) if other is not None else {}

    def settled(key: Any, record: CallRecord) -> CallRecord:
        theirs = iter(pytree.tree_leaves((others[key].inputs, others[key].output)) if key in others else ())

        def leaf(ours: Leaf) -> Leaf:
            same = ours.plain is not True if other is None else ours.plain == getattr(next(theirs, None), "plain", None)
            return ours if same else Leaf(kind="a value that depends on the mode")

        return record.map(leaf)

    graph.output_node().meta[CALL_RECORDS] = {key: settled(key, record) for key, record in records.items()}
