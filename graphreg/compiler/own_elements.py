"""A pass that gives keys and strengths on a CPU a buffer each, so that Inductor compiles one kernel for sites that are alike.

All sites share a few small tensors: the keys of a call, the rates, the strengths. The kernel of a
site reads its own element, so the kernels of twelve equal blocks differ in one number, and Inductor
hands twelve sources to the C++ compiler, which takes most of the time to compile. Inductor compiles
equal sources once. The pass replaces ``select`` by the operator ``graphreg::element``, whose result
Inductor writes to a buffer. One kernel at the start of the graph then writes all these buffers, and
the kernels of the sites are equal. A GPU would have to launch that kernel, so the pass leaves other
devices alone.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, fx

from graphreg.torch_internals.inductor import pointwise, register_lowerings

# elements of the tensor that is read; for more, one loop that writes them all would take long to
# compile
FEW = 4096
KEY = 2  # elements of a result: a key has two words, a strength is one number
_SELECT = torch.ops.aten.select.int


@torch.library.custom_op("graphreg::element", mutates_args=())
def element(tensor: Tensor, dim: int, index: int) -> Tensor:
    """Copy ``tensor.select(dim, index)``."""
    return tensor.select(dim, index).clone()


@element.register_fake
def _(tensor: Tensor, dim: int, index: int) -> Tensor:
    return tensor.select(dim, index).clone()


def give_buffers(graph: fx.Graph) -> int:
    """Replace the ``select`` nodes that read different keys or numbers of one small CPU tensor. Return how many were replaced."""
    by_tensor: dict[fx.Node, list[fx.Node]] = defaultdict(list)
    for node in graph.find_nodes(op="call_function", target=_SELECT):
        if _is_small(node.args[0], FEW) and _is_small(node, KEY):
            by_tensor[node.args[0]].append(node)
    shared = {tensor: nodes for tensor, nodes in by_tensor.items() if len({node.args[1:] for node in nodes}) > 1}
    if not shared or not register_lowerings({torch.ops.graphreg.element.default: _lowered}):
        return 0
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    for tensor, nodes in shared.items():
        # side by side, because Inductor puts loops into one kernel only if few operations are
        # between them
        with graph.inserting_after(inputs[-1] if tensor.op == "placeholder" else tensor):
            for node in nodes:
                own = graph.call_function(torch.ops.graphreg.element.default, node.args)
                own.meta.update(node.meta)
                node.replace_all_uses_with(own)
                graph.erase_node(node)
    return sum(map(len, shared.values()))


def _is_small(node: Any, most: int) -> bool:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    if not isinstance(value, Tensor) or value.device.type != "cpu" or not all(isinstance(size, int) for size in value.shape):
        return False
    return value.numel() <= most


def _lowered(tensor: Any, dim: int, index: int) -> Any:
    """Lower ``element`` to a loop whose result Inductor writes to a buffer."""
    read, dim = tensor.make_loader(), dim % len(tensor.get_size())
    shape = [size for axis, size in enumerate(tensor.get_size()) if axis != dim]
    result = pointwise(tensor, tensor.get_dtype(), shape, lambda _, place: read([*place[:dim], index, *place[dim:]]))
    result.realize()
    return result
