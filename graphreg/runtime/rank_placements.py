"""Finds how the ranks of tensor parallelism share each value of a graph, from the layers that torch made parallel.

A value that a parallel layer returns as a plain tensor has the placement that the layer's style declares. The result of an elementwise
operation has the placement of its inputs; so has the result of a layer that looks only along the last axis, if ranks divide another axis.
If every rank has the inputs of an operation whole, every rank has the result whole. Nothing else is inferred.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from graphreg.blocks import is_block
from graphreg.errors import GraphRegError
from graphreg.ir import Operations, function_name, is_elementwise
from graphreg.runtime.rank_layout import is_dtensor
from graphreg.runtime.runtime_module import RuntimeModule
from graphreg.torch_internals import is_distributed, output_layout

WHOLE, DTENSOR = "whole", "dtensor"
# functions that keep each element at its place, and that torch does not tag as pointwise
_SAME = {"contiguous", "clone", "to", "float", "half", "double", "bfloat16", "detach", "type_as", "relu", "relu_"}
_LAST_AXIS = (nn.Linear, nn.LayerNorm, nn.RMSNorm)  # look only along the last axis
_ELEMENTWISE = (nn.ReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.ELU, nn.LeakyReLU, nn.Softplus, nn.Hardswish, nn.Mish, nn.Identity)


@dataclass(frozen=True)
class Unknown:
    """Says that it is not known how ranks share a value. ``why``: the reason, for a message."""

    why: str


Sharing = str | int | Unknown  # WHOLE, DTENSOR, the axis that ranks divide, or Unknown


def sharings(root: nn.Module, graph: fx.Graph, dimension: str) -> dict[fx.Node, Sharing]:
    """Return how ranks share the value of each node of a graph.

    Args:
        root: The rewritten module.
        graph: One of its graphs.
        dimension: The dimension of the mesh along which these ranks lie.

    Raises:
        GraphRegError: A module that the graph does not call has a hook of tensor parallelism, which then never runs.
    """
    _refuse_uncalled(root, graph)
    operations, found = Operations(root), dict[fx.Node, Sharing]()
    for node in graph.nodes:
        found[node] = _sharing(node, operations, found, dimension)
    return found


def has_parallel_layers(root: nn.Module, dimension: str) -> bool:
    """Return whether ranks along a dimension share a parameter of a module. FSDP shards parameters along other dimensions."""
    return any(_is_shared(parameter, dimension) for parameter in root.parameters())


def _is_shared(value: Any, dimension: str) -> bool:
    return is_dtensor(value) and dimension in (value.device_mesh.mesh_dim_names or (dimension,))


def _sharing(node: fx.Node, operations: Operations, found: dict[fx.Node, Sharing], dimension: str) -> Sharing:
    if node.op == "placeholder":
        return WHOLE
    if node.op == "get_attr":
        return DTENSOR if _is_shared(_attribute(operations.modules[""], str(node.target)), dimension) else WHOLE
    module = operations.module(node)
    values = [found[each] for each in node.all_input_nodes]
    if isinstance(module, RuntimeModule):
        return values[0] if values else WHOLE  # a splice keeps the placement of its value, which is its first argument
    if module is not None and (declared := output_layout(module)) is not None:
        placement, is_local = declared
        if not is_local:
            return DTENSOR
        return WHOLE if placement.is_replicate() else int(placement.dim) if placement.is_shard() else Unknown(f"is {placement}")
    if module is not None and has_parallel_layers(module, dimension):
        return Unknown(f"comes from {node.target!r}, whose parameters are DTensors, and which no style of torch made parallel")
    others = [value for value in values if value != WHOLE]
    if not others or any(isinstance(value, Unknown) for value in others):
        return others[0] if others else WHOLE
    if DTENSOR in others:
        return Unknown(f"comes from {node.name!r}") if function_name(node) == "to_local" else DTENSOR
    return _carried(node, module, operations, others)


def _carried(node: fx.Node, module: nn.Module | None, operations: Operations, axes: list[Any]) -> Sharing:
    """Return how ranks share the result of an operation. ``axes``: for each input that ranks divide, the axis that they divide."""
    axis = axes[0]
    first = node.args[0] if node.args else None
    same = isinstance(module, _ELEMENTWISE) or operations.is_dropout(node) or is_elementwise(node) or function_name(node) in _SAME
    if same and len(set(axes)) == 1:
        return int(axis)
    if isinstance(module, _LAST_AXIS) and len(axes) == 1 and isinstance(first, fx.Node) and axis < -1:
        return int(axis)
    what = f"{type(module).__name__} {node.target!r}" if module is not None else f"{function_name(node)!r}"
    return Unknown(f"comes from {what}, which gets a part of a value")


def _attribute(root: nn.Module, path: str) -> Any:
    value: Any = root
    for name in path.split("."):
        value = getattr(value, name)
    return value


def _refuse_uncalled(root: nn.Module, graph: fx.Graph) -> None:
    called = {str(node.target) for node in graph.nodes if node.op == "call_module"}
    for path, module in root.named_modules():
        if not path or not is_distributed(module) or is_block(module) or _is_within(path, called):
            continue
        raise GraphRegError(
            f"tensor parallelism has a hook on {path!r}, and the emitted code runs the operations inside that module without calling it, "
            f"so that the hook never runs. Make it a block that is called: graphreg.regularize(model, ..., blocks={path!r})."
        )


def _is_within(path: str, called: Iterable[str]) -> bool:
    return any(path == target or path.startswith(f"{target}.") for target in called)
