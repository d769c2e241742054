"""Finds how the ranks of tensor parallelism share each value of a graph, from the layers that torch made parallel.

A value that a parallel layer returns as a plain tensor has the placement that the layer's style declares. The result of an elementwise
operation has the placement of its inputs; so has the result of a layer that looks only along the last axis, if ranks divide another axis.
If every rank has the inputs of an operation whole, every rank has the result whole, unless the operation is one of torch.distributed. A
style on a block (``blocks=``) converts the values that enter the block or leave it. Nothing else is inferred.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from graphreg.ir.convolution_axes import is_elementwise
from graphreg.ir.metadata import calls_of
from graphreg.ir.module_record import state_of
from graphreg.ir.operations import Operations, function_name
from graphreg.runtime.runtime_module import RuntimeModule
from graphreg.torch_internals.distributed import is_distributed
from graphreg.torch_internals.operators import OpOverload, OpOverloadPacket
from graphreg.torch_internals.tensor_parallel import Layout, has_parallel_hooks, input_layout, output_layout

WHOLE, DTENSOR = "whole", "dtensor"
# functions that keep each element at its place, and that torch does not tag as pointwise
_SAME = {"contiguous", "clone", "to", "float", "half", "double", "bfloat16", "detach", "type_as", "relu", "relu_"}
_LAST_AXIS = (nn.Linear, nn.LayerNorm, nn.RMSNorm)  # look only along the last axis
_ELEMENTWISE = (nn.ReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.ELU, nn.LeakyReLU, nn.Softplus, nn.Hardswish, nn.Mish, nn.Identity)


@dataclass(frozen=True)
class Unknown:
    """Says that it is not known how ranks share a value. ``why``: the reason, for a message."""

    why: str


class Unequal(Unknown):
    """Says that ranks divide a value in parts of different sizes. ``why``: the reason, for a message."""


Sharing = str | int | Unknown  # WHOLE, DTENSOR, the axis that ranks divide, or Unknown


def sharings(root: nn.Module, graph: fx.Graph, dimension: str) -> dict[fx.Node, Sharing]:
    """Return how ranks share the value of each node of a graph.

    Args:
        root: The rewritten module.
        graph: One of its graphs.
        dimension: The dimension of the mesh along which these ranks lie.
    """
    operations, borders, found = Operations(root), _Borders(root, dimension), dict[fx.Node, Sharing]()
    for node in graph.nodes:
        read = {each: borders.passed(each, node, found[each]) for each in node.all_input_nodes}
        found[node] = _sharing(node, operations, read, dimension)
    return found


def has_parallel_layers(root: nn.Module, dimension: str) -> bool:
    """Return whether ranks along a dimension share a parameter of a module. FSDP shards parameters along other dimensions."""
    return any(_is_shared(parameter, dimension) for parameter in root.parameters())


class _Borders:
    """The blocks that ``parallelize_module`` was applied to: it converts the values that enter and leave them."""

    def __init__(self, root: nn.Module, dimension: str) -> None:
        state = state_of(root)
        blocks = {path: root.get_submodule(path) for path in (state.blocks if state is not None else ())}
        self.dimension = dimension
        self.blocks = {path: block for path, block in blocks.items() if has_parallel_hooks(block)}

    def passed(self, source: fx.Node, reader: fx.Node, sharing: Sharing) -> Sharing:
        """Return how ranks share the value that ``reader`` gets from ``source``, whose value is shared as ``sharing`` says."""
        if not self.blocks or source.op == "get_attr":
            return sharing
        outside, inside = calls_of(source) or (), calls_of(reader) or ()
        # From the innermost block outwards, in the order in which the value leaves them.
        for path, *_ in reversed([call for call in outside if call not in inside and call[0] in self.blocks]):
            if (layout := output_layout(self.blocks[path])) is not None:
                sharing = _declared(layout, f"leaves the block {path!r}", self.blocks[path], self.dimension)
        for path, *_ in [call for call in inside if call not in outside and call[0] in self.blocks]:
            if (layout := input_layout(self.blocks[path])) is not None:
                sharing = _converted(layout, f"enters the block {path!r}")
        return sharing


def _is_shared(value: Any, dimension: str) -> bool:
    return is_distributed(value) and dimension in (value.device_mesh.mesh_dim_names or (dimension,))


def _sharing(node: fx.Node, operations: Operations, read: dict[fx.Node, Sharing], dimension: str) -> Sharing:
    """Return how ranks share the value of a node. ``read``: how they share the values that the node reads."""
    if node.op == "placeholder":
        return WHOLE
    if node.op == "get_attr":
        return DTENSOR if _is_shared(_attribute(operations.modules[""], str(node.target)), dimension) else WHOLE
    module, values = operations.module(node), list(read.values())
    if isinstance(module, RuntimeModule):
        return values[0] if values else WHOLE  # a splice keeps the placement of its value, which is its first argument
    if module is not None and has_parallel_hooks(module):
        layout = output_layout(module) or Layout((), is_local=True)
        return _declared(layout, f"comes from {node.target!r}", module, dimension)
    if module is not None and has_parallel_layers(module, dimension):
        return Unknown(f"comes from {node.target!r}, whose parameters are DTensors, and which no style of torch made parallel")
    if function_name(node) == "to_local" or _communicates(node):
        return Unknown(f"comes from {function_name(node)!r}")
    others = [value for value in values if value != WHOLE]
    if not others or any(isinstance(value, Unknown) for value in others):
        return next((value for value in others if isinstance(value, Unknown)), WHOLE)
    if DTENSOR in others:
        return _of_dtensors(node, module)
    return _carried(node, module, operations, read)


def _communicates(node: fx.Node) -> bool:
    """Return whether a node calls a function or an operator with which ranks send each other values."""
    function = node.target if node.op == "call_function" else None
    name = str(function) if isinstance(function, (OpOverload, OpOverloadPacket)) else str(getattr(function, "__module__", ""))
    return name.startswith(("torch.distributed", "_c10d_functional", "c10d"))


def _declared(layout: Layout, what: str, module: nn.Module, dimension: str) -> Sharing:
    """Return how ranks share the only result of a module. ``what``: where the result comes from, for a message."""
    sharing = _converted(layout, what)
    weight: Any = getattr(module, "weight", None)
    # Only the last axis has the features, whose number the weight tells.
    if sharing != -1 or not is_distributed(weight):
        return sharing
    features = weight.shape[0] if isinstance(module, nn.Linear) else weight.shape[-1]
    parts = weight.device_mesh[dimension].size() if weight.device_mesh.ndim > 1 else weight.device_mesh.size()
    return Unequal(f"{what}, and {parts} ranks divide its {features} features unequally") if features % parts else sharing


def _converted(layout: Layout, what: str) -> Sharing:
    """Return how ranks share a tensor that a parallel style converts. ``what``: where the tensor comes from, for a message."""
    if len(layout.placements) != 1 or layout.placements[0] is None:
        return Unknown(f"{what}, and what the style of that module does to it is not known")
    placement = layout.placements[0]
    if not layout.is_local:
        return DTENSOR
    return WHOLE if placement.is_replicate() else int(placement.dim) if placement.is_shard() else Unknown(f"{what}, as {placement}")


def _of_dtensors(node: fx.Node, module: nn.Module | None) -> Sharing:
    """Return how ranks share the result of an operation that gets DTensors."""
    if function_name(node) == "full_tensor":
        return WHOLE
    if module is not None and not type(module).__module__.startswith("torch.nn.modules"):
        return Unknown(f"comes from {node.target!r}, which is not traced and gets a DTensor")
    return DTENSOR


def _carried(node: fx.Node, module: nn.Module | None, operations: Operations, read: dict[fx.Node, Sharing]) -> Sharing:
    """Return how ranks share the result of an operation that gets parts of values, and otherwise values that all ranks have whole."""
    axes = [sharing for sharing in read.values() if isinstance(sharing, int)]
    axis = axes[0]
    first = node.args[0] if node.args else None
    same = isinstance(module, _ELEMENTWISE) or operations.is_dropout(node) or is_elementwise(node) or function_name(node) in _SAME
    # a whole operand with more axes would move an axis that is counted from the first
    moved = axis >= 0 and any(sharing == WHOLE and source.op != "get_attr" for source, sharing in read.items())
    if same and len(set(axes)) == 1 and not moved:
        return axis
    if isinstance(module, _LAST_AXIS) and len(axes) == 1 and isinstance(first, fx.Node) and axis < -1:
        return axis
    what = f"{type(module).__name__} {node.target!r}" if module is not None else f"{function_name(node)!r}"
    return Unknown(f"comes from {what}, which gets a part of a value")


def _attribute(root: nn.Module, path: str) -> Any:
    value: Any = root
    for name in path.split("."):
        value = getattr(value, name)
    return value
