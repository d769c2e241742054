"""Decides whether a compiled splice saves its result for backward or recomputes it. The result is the same; only the cost differs.

Some operations find their derivative from their own output: ReLU, sigmoid, softmax. Their output is saved for backward
once, and the product that reads it saves the same tensor. A splice in between separates the two: the product saves the spliced
value, and a partitioner that weighs bytes saves ``output <= 0`` beside it, as a bool tensor, which Inductor stores on a CPU at
12 ns an element (a float: 0.1): a ReLU of 131k elements took 1.5 ms instead of 0.03. There the splice is recomputed in
backward from the output and the draws (an int8 mask), so that the output is saved as before, and nothing else of its size.

Behind a normalization the output can be recomputed from what the normalization saves, so recomputing the splice gains nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torch.fx import traceback
from torch.utils.checkpoint import CheckpointPolicy, checkpoint

from graphreg.ir import Operations, function_name
from graphreg.rng import Noise
from graphreg.torch_internals import Changes, next_region

# derivatives written in terms of the output
FROM_OUTPUT = {"relu", "relu_", "threshold", "sigmoid", "sigmoid_", "tanh", "tanh_", "softmax", "log_softmax", "exp", "sqrt", "rsqrt"}
_ELEMENTWISE = {"add", "sub", "mul", "div", "iadd", "isub", "imul", "truediv", "itruediv", "neg", "add_", "mul_", "sub_", "div_", "cat"}


def recomputed(node: fx.Node, operations: Operations, replaced: Container[fx.Node] = ()) -> bool:
    """Whether a splice of the node's value is recomputed in backward, when compiled. ``replaced``: nodes whose value is spliced."""
    return _name(node, operations) in FROM_OUTPUT and not _behind_norm(node, operations, replaced)


def _name(node: fx.Node, operations: Operations) -> str:
    module = operations.module(node)
    return type(module).__name__.lower() if module is not None else function_name(node)


def _behind_norm(node: fx.Node, operations: Operations, replaced: Container[fx.Node]) -> bool:
    """Whether elementwise operations alone lie between the value and a normalization."""
    ahead, seen = list(node.all_input_nodes), {node}
    while ahead:
        source = ahead.pop()
        if source in replaced:  # what stands in its place is neither
            continue
        if operations.is_norm(source):
            return True
        if source not in seen and (function_name(source) in _ELEMENTWISE or operations.passes_through(source)):
            ahead.extend(source.all_input_nodes)
        seen.add(source)
    return False


def recompute_in_backward(formula: Callable[[Tensor, Tensor, Noise], Tensor], z: Tensor, weight: Tensor, noise: Noise) -> Tensor:
    """Run a splice's formula so that backward recomputes the result from ``z`` and the draws instead of saving it.

    It is called twice: outside the recomputed region for its draws (the compiler drops the rest), inside for its value.
    """
    draws: list[Tensor] = []
    formula(z.detach(), weight, _DrawRecorder(noise.key, draws))

    def again(z: Tensor, weight: Tensor, key: Tensor, *draws: Tensor) -> Tensor:
        return formula(z, weight, _RecordedDraws(key, list(draws)))

    if not torch.compiler.is_dynamo_compiling():
        with _marked():
            return again(z, weight, noise.key, *draws)
    y = checkpoint(again, z, weight, noise.key, *draws, use_reentrant=False, preserve_rng_state=False)
    assert isinstance(y, Tensor)
    return y


@contextmanager
def _marked() -> Iterator[None]:
    """Mark the operations in the block as Dynamo marks those of a checkpointed region; for graphs that are made below Dynamo."""
    with Changes() as changes, changes:
        changes.put(traceback.current_meta, "recompute", CheckpointPolicy.PREFER_RECOMPUTE)
        changes.put(traceback.current_meta, "ac_graph_id", next_region())
        yield


@dataclass(eq=False)
class _DrawRecorder(Noise):
    """Noise that records its draws."""

    draws: list[Tensor]

    def keep(self, z: Tensor, p: Tensor | float) -> Tensor:
        return self._record(super().keep(z, p))

    def uniform(self, z: Tensor) -> Tensor:
        return self._record(super().uniform(z))

    def normal(self, z: Tensor) -> Tensor:
        return self._record(super().normal(z))

    def _record(self, draw: Tensor) -> Tensor:
        self.draws.append(draw)
        return draw


@dataclass(eq=False)
class _RecordedDraws(Noise):
    """Noise that returns recorded draws, in the same order."""

    draws: list[Tensor]

    def keep(self, z: Tensor, p: Tensor | float) -> Tensor:
        return self.draws.pop(0)

    def uniform(self, z: Tensor) -> Tensor:
        return self.draws.pop(0)

    def normal(self, z: Tensor) -> Tensor:
        return self.draws.pop(0)
