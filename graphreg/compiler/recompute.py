"""Decides whether a compiled splice saves its result for backward or recomputes it. The result is the same; only the cost differs.

Some operations, such as ReLU, sigmoid and softmax, compute their derivative from their output.
Without a splice, the operation and the matrix product that reads its output save the same tensor
for backward. With a splice in between, the product saves the spliced value. For a ReLU, a
partitioner that minimizes bytes then also saves ``output <= 0``, as a bool tensor. On a CPU,
Inductor needs 12 ns to store a bool, and 0.1 ns to store a float: a ReLU of 131k elements took 1.5
ms instead of 0.03 ms.

So after such an operation, backward recomputes the splice from the operation's output and the draws
(an int8 mask). The forward then saves the operation's output, as it would without a splice, and the
draws, but not the spliced value.

If such an operation follows a normalization, backward can recompute the operation's output from the
tensors that the normalization keeps. Recomputing the splice would then save no memory, so
``recomputed`` returns False.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx
from torch.fx import traceback
from torch.utils.checkpoint import CheckpointPolicy, checkpoint

from graphreg.ir.operations import Operations, function_name
from graphreg.rng.noise import Noise
from graphreg.torch_internals.checkpointing import next_region
from graphreg.torch_internals.patching import Changes

# operations whose derivative is computed from their output
FROM_OUTPUT = {"relu", "relu_", "threshold", "sigmoid", "sigmoid_", "tanh", "tanh_", "softmax", "log_softmax", "exp", "sqrt", "rsqrt"}
_ELEMENTWISE = {"add", "sub", "mul", "div", "iadd", "isub", "imul", "truediv", "itruediv", "neg", "add_", "mul_", "sub_", "div_", "cat"}


def recomputed(node: fx.Node, operations: Operations, replaced: Container[fx.Node] = ()) -> bool:
    """Return whether, in compiled code, backward recomputes a splice that reads the node's value.

    ``replaced``: the nodes whose values splices have replaced.
    """
    module = operations.module(node)
    name = type(module).__name__.lower() if module is not None else function_name(node)
    return name in FROM_OUTPUT and not _follows_norm(node, operations, replaced)


def _follows_norm(node: fx.Node, operations: Operations, replaced: Container[fx.Node]) -> bool:
    """Return whether the node's value is computed from the result of a normalization by elementwise operations only."""
    waiting, visited = list(node.all_input_nodes), {node}
    while waiting:
        source = waiting.pop()
        # the reader gets the splice's result; a splice is neither a normalization nor in
        # _ELEMENTWISE
        if source in replaced:
            continue
        if operations.is_norm(source):
            return True
        if source not in visited and (function_name(source) in _ELEMENTWISE or operations.passes_through(source)):
            waiting.extend(source.all_input_nodes)
        visited.add(source)
    return False


def recompute_in_backward(
    formula: Callable[[Tensor, Tensor, Noise], Tensor], z: Tensor, weight: Tensor, noise: Noise, redraws: bool = False
) -> Tensor:
    """Run a splice's formula so that backward recomputes the result from ``z`` and the draws instead of saving it.

    The formula is called twice: first outside the recomputed region, only to get its draws (the
    compiler removes the other operations of this call), then inside the region, with these draws,
    to compute the value. With ``redraws``, the formula is called once, in the region, and backward
    draws again from the key. This is for splices on parameters: the parameter is in memory anyway,
    so no further tensor as large as the parameter has to be saved.
    """
    if redraws:
        return _in_region(lambda z, weight, key: formula(z, weight, Noise(key, noise.shared, noise.window)), z, weight, noise.key)
    draws: list[Tensor] = []
    formula(z.detach(), weight, _DrawRecorder(noise.key, noise.shared, noise.window, draws=draws))

    def again(z: Tensor, weight: Tensor, key: Tensor, *draws: Tensor) -> Tensor:
        # A list for each run, because a run takes the draws out of it, and backward runs again.
        return formula(z, weight, _RecordedDraws(key, draws=list(draws)))

    return _in_region(again, z, weight, noise.key, *draws)


def _in_region(function: Callable[..., Tensor], *args: Tensor) -> Tensor:
    """Call a function in a region that a compiled backward recomputes."""
    if not torch.compiler.is_dynamo_compiling():
        with _marked():
            return function(*args)
    y = checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)
    assert isinstance(y, Tensor)
    return y


@contextmanager
def _marked() -> Iterator[None]:
    """Mark the operations in the block as Dynamo marks those of a checkpointed region.

    This is for splices that AOTAutograd traces without Dynamo, such as those in the graphs of
    ``graphreg.backend``.
    """
    with Changes() as changes, changes:
        changes.put(traceback.current_meta, "recompute", CheckpointPolicy.PREFER_RECOMPUTE)
        changes.put(traceback.current_meta, "ac_graph_id", next_region())
        yield


@dataclass(eq=False)
class _DrawRecorder(Noise):
    """Noise that records its draws."""

    draws: list[Tensor] = field(kw_only=True)

    def keep(self, z: Tensor, p: Tensor | float, shared: Iterable[int] = ()) -> Tensor:
        return self._record(super().keep(z, p, shared))

    def uniform(self, z: Tensor, shared: Iterable[int] = ()) -> Tensor:
        return self._record(super().uniform(z, shared))

    def normal(self, z: Tensor, shared: Iterable[int] = ()) -> Tensor:
        return self._record(super().normal(z, shared))

    def _record(self, draw: Tensor) -> Tensor:
        self.draws.append(draw)
        return draw


@dataclass(eq=False)
class _RecordedDraws(Noise):
    """Noise that returns recorded draws, in the same order."""

    draws: list[Tensor] = field(kw_only=True)

    def keep(self, z: Tensor, p: Tensor | float, shared: Iterable[int] = ()) -> Tensor:
        return self.draws.pop(0)

    def uniform(self, z: Tensor, shared: Iterable[int] = ()) -> Tensor:
        return self.draws.pop(0)

    def normal(self, z: Tensor, shared: Iterable[int] = ()) -> Tensor:
        return self.draws.pop(0)
