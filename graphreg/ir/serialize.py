"""Converts graphs to plain data and back, for pickle.

torch.fx pickles generated code and traces it again. That would lose the names of sites. If a module has one graph for train mode and one
for eval mode, it would also lose one of these.
"""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_aggregate

from graphreg.ir.call_records import CALL_RECORDS
from graphreg.ir.metadata import ADDITION, CALLS, CAUGHT, SITE
from graphreg.torch_internals.emitted_code import DEFAULT
from graphreg.torch_internals.fx import share_emitter
from graphreg.torch_internals.operators import OpOverload, OpOverloadPacket, overload_name, qualified_name, schema_of

CARRIED = (SITE, ADDITION, CALLS, CAUGHT, CALL_RECORDS, DEFAULT, "value")  # the entries of node.meta that are pickled


@dataclass(frozen=True)
class _Ref:
    index: int


@dataclass(frozen=True)
class _Operator:
    """The names of an operator of torch.ops; the operator itself cannot be pickled."""

    namespace: str
    name: str
    overload: str | None

    @classmethod
    def of(cls, target: Any) -> Any:
        if isinstance(target, OpOverload):
            namespace, _, name = schema_of(target).name.partition("::")
            return cls(namespace, name, overload_name(target))
        if isinstance(target, OpOverloadPacket):
            namespace, _, name = qualified_name(target).partition("::")
            return cls(namespace, name, None)
        return target

    def resolved(self) -> Any:
        packet = getattr(getattr(torch.ops, self.namespace), self.name)
        return packet if self.overload is None else getattr(packet, self.overload)


@dataclass(frozen=True)
class _Function:
    """Where a function is that torch has made within another one, such as ``F.max_pool2d``: pickle looks for it by its qualified name."""

    home: str
    name: str

    @classmethod
    def of(cls, target: Any) -> Any:
        if not isinstance(target, FunctionType) or "<locals>" not in target.__qualname__:
            return target
        home, name = str(target.__module__), target.__name__
        return cls(home, name) if getattr(sys.modules.get(home), name, None) is target else target

    def resolved(self) -> Any:
        return getattr(importlib.import_module(self.home), self.name)


def freeze(graph: fx.Graph) -> list[tuple[Any, ...]]:
    """Convert a graph to a flat list of node records. Pickling linked nodes recurses, and overflows the stack for a long graph."""
    index = {node: _Ref(i) for i, node in enumerate(graph.nodes)}

    def plain(leaf: Any) -> Any:
        return index[leaf] if isinstance(leaf, fx.Node) else leaf

    return [
        (
            n.op,
            n.name,
            _Function.of(_Operator.of(n.target)),
            map_aggregate(n.args, plain),
            map_aggregate(n.kwargs, plain),
            {k: n.meta[k] for k in CARRIED if k in n.meta},
        )
        for n in graph.nodes
    ]


def thaw(records: list[tuple[Any, ...]]) -> fx.Graph:
    """Rebuild the graph from a list of node records."""
    graph, nodes = fx.Graph(), list[fx.Node]()

    def linked(leaf: Any) -> Any:
        return nodes[leaf.index] if isinstance(leaf, _Ref) else leaf

    for op, name, target, args, kwargs, meta in records:
        resolved = target.resolved() if isinstance(target, (_Operator, _Function)) else target
        node = graph.create_node(op, resolved, map_aggregate(args, linked), map_aggregate(kwargs, linked), name)
        node.meta.update(meta)
        nodes.append(node)
    return graph


def copied_graph(graph: fx.Graph) -> fx.Graph:
    """Return a copy of a graph, with its code generator and the metadata of all its nodes."""
    copy = blank_like(graph)
    value = copy.graph_copy(graph, {})
    copy.output(value).meta.update(graph.output_node().meta)
    return copy


def blank_like(graph: fx.Graph) -> fx.Graph:
    """Return a graph without nodes that has the code generator of ``graph``."""
    blank = fx.Graph()
    share_emitter(graph, blank)
    return blank
