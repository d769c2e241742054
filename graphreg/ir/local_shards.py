"""Finds the values of a graph that are plain tensors of which each rank has a part, as layers under tensor parallelism may return them."""

from __future__ import annotations

from collections.abc import Callable

from torch import fx

from graphreg.ir.dataflow import sizes_of
from graphreg.ir.metadata import Kind, addition_of, own_name

# whether a node returns a local shard; None if it computes one from one
Returns = Callable[[fx.Node], bool | None]
# whether the second node gets a local shard from the first; None if it gets its value
Crosses = Callable[[fx.Node, fx.Node], bool | None]


def no_border(source: fx.Node, reader: fx.Node) -> None:
    """Say that a node gets the value that another node returns."""


def measured_shard(graph: fx.Graph, returns: Returns, crosses: Crosses = no_border) -> tuple[str, str, str] | None:
    """Return a penalty that measures a local shard: its name, the site, and what the shard comes from. None if there is none."""
    shards = _local_shards(graph, returns, crosses)
    for node in graph.nodes if shards else ():
        added = addition_of(node)
        if added is None or added.kind not in (Kind.MEASURE, Kind.TOTAL):
            continue
        for read in node.all_input_nodes:
            if read in shards:
                origin = shards[read]
                maker = str(origin.target) if origin.op == "call_module" else own_name(origin) or origin.name
                return str(added.regularizer), added.site or own_name(read) or read.name, maker
    return None


def _local_shards(graph: fx.Graph, returns: Returns, crosses: Crosses) -> dict[fx.Node, fx.Node]:
    """Return the nodes whose values are local shards, each with the node that the shard comes from."""
    found: dict[fx.Node, fx.Node] = {}
    sizes = sizes_of(graph)
    for node in graph.nodes:
        answer = False if node in sizes else returns(node)
        if answer is None:
            inputs = {each: crosses(each, node) for each in node.all_input_nodes if each not in sizes}
            shards = [each for each, is_shard in inputs.items() if (each in found if is_shard is None else is_shard)]
            if shards:
                found[node] = found.get(shards[0], shards[0])
        elif answer:
            found[node] = node
    return found
