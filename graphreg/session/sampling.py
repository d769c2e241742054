"""``graphreg.sample``: mean and spread of a module's output over many passes with the noise on (Gal & Ghahramani 2016)."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from graphreg.errors import RegularizerError, shown
from graphreg.ir.precision import widest
from graphreg.runtime.result import Regularized
from graphreg.session.controls import noise_on
from graphreg.session.hosts import session_of
from graphreg.torch_internals import pytree
from graphreg.torch_internals.patching import Changes
from graphreg.tracing.fake_inputs import arguments


@dataclass(frozen=True)
class Samples:
    """The result of ``sample``. Mean, spread and outputs have the structure of the model's output.

    Attributes:
        n: The number of passes.
        mean: The mean over the passes, with the shapes of one output, float32 or wider.
        spread: The standard deviation over the passes, with n - 1 in the denominator of the variance. Shapes and dtypes are those of the
            mean; nan for n = 1.
        outputs: The outputs of all passes, each tensor [n, ...], or None with ``keep=False``.
    """

    n: int
    mean: Any
    spread: Any
    outputs: Any

    def __repr__(self) -> str:
        shapes = ", ".join(str(list(t.shape)) if isinstance(t, Tensor) else repr(t) for t in pytree.tree_leaves(self.mean))
        spreads = [t.mean() for t in pytree.tree_leaves(self.spread) if isinstance(t, Tensor)]
        return f"Samples(n={self.n}, mean: {shapes}, spread: {', '.join(f'{float(s):.3g}' for s in spreads)} on average)"


def sample(module: nn.Module, inputs: Any, n: int, *, keep: bool = True, progress: bool | None = None) -> Samples:
    """Run ``n`` passes of a module in eval mode, but with its noise on, and without gradients. Afterwards all modes are as before.

    Args:
        module: A rewritten module, also compiled or wrapped, or a model that is regularized in place. Each pass is a call with masks of
            its own.
        inputs: A tensor, a tuple (positional arguments) or a dict (keyword arguments).
        n: The number of passes, 1 or more.
        keep: Whether to return all outputs. ``False`` keeps in memory only what mean and spread need (Welford 1962).
        progress: Whether to show a line of progress on stderr; None shows it if stderr is a terminal.

    Raises:
        RegularizerError: An argument is out of its range.
        GraphRegError: The module draws no noise.
    """
    if not isinstance(n, int) or isinstance(n, bool) or n < 1:
        raise RegularizerError(f"n={shown(n)} is not allowed; n is the number of passes, a whole number of 1 or more.")
    if progress is not None and not isinstance(progress, bool):
        raise RegularizerError(
            f"progress={shown(progress)} is not allowed; give True, False, or None to show a line if stderr is a terminal."
        )
    session_of(module).require_draws()
    call = arguments(inputs, "inputs")
    if call is None:
        raise RegularizerError("inputs=None is not allowed; give a tensor, a tuple (positional) or a dict (keyword).")
    running = _Running()
    # Eval mode, so that batch norm uses the statistics of training, as in a prediction.
    with _evaluating(module), noise_on(module), torch.no_grad(), _line(n, progress) as line:
        for i in range(n):
            line.at(i)
            result = module(*call[0], **call[1])
            running.take(result.output if isinstance(result, Regularized) else result, keep)
    return running.samples()


class _Running:
    """The running mean and the running sum of squared deviations of an output's tensors."""

    def __init__(self) -> None:
        self.n, self.rest = 0, list[Any]()
        self.spec: pytree.TreeSpec = pytree.treespec_leaf()
        self.mean: list[Tensor] = []
        self.squares: list[Tensor] = []
        self.stored: list[list[Tensor]] = []

    def take(self, output: Any, keep: bool) -> None:
        """Update mean and deviations with the output of one pass; ``keep``: whether to store this output, too."""
        self.n += 1
        self.rest, self.spec = pytree.tree_flatten(output)
        tensors = [leaf for leaf in self.rest if isinstance(leaf, Tensor)]
        if not tensors:
            raise RegularizerError(
                f"the module's output is {type(output).__name__}, and no tensor is found in it to average. "
                "Make its class known: torch.utils._pytree.register_dataclass, or register_pytree_node."
            )
        # Half precision could not hold the sums, and integers have no mean of their own.
        values = [t.to(torch.float32 if t.is_floating_point() and t.dtype != torch.float64 else widest(t.device)) for t in tensors]
        if self.n == 1:
            self.mean, self.squares = [torch.zeros_like(v) for v in values], [torch.zeros_like(v) for v in values]
        for i, value in enumerate(values):
            # Welford: the deviation from the mean before this pass, times that from the mean after
            # it.
            away = value - self.mean[i]
            self.mean[i] = self.mean[i] + away / self.n
            self.squares[i] = self.squares[i] + away * (value - self.mean[i])
        if keep:
            self.stored.append([t.clone() for t in tensors])  # a compiled module may reuse its output's memory

    def samples(self) -> Samples:
        spread = [(s / (self.n - 1)).sqrt() if self.n > 1 else torch.full_like(s, torch.nan) for s in self.squares]
        outputs = self._like([torch.stack(passes) for passes in zip(*self.stored, strict=True)]) if self.stored else None
        return Samples(self.n, self._like(self.mean), self._like(spread), outputs)

    def _like(self, tensors: Sequence[Tensor]) -> Any:
        """Build an output with these tensors; its other values come from the last pass."""
        values = iter(tensors)
        return pytree.tree_unflatten([next(values) if isinstance(leaf, Tensor) else leaf for leaf in self.rest], self.spec)


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Put the module into eval mode in the block, and restore the mode of every submodule afterwards."""
    with Changes() as changes, changes:
        for m in module.modules():
            changes.later(partial(setattr, m, "training", m.training))
        module.eval()
        yield


class _Line:
    """Shows the progress on one line, which it overwrites at most ten times a second."""

    def __init__(self, n: int, shown: bool) -> None:
        self.n, self.shown, self.last = n, shown, 0.0

    def at(self, done: int) -> None:
        now = time.monotonic()
        if self.shown and now - self.last > 0.1:
            self.last = now
            sys.stderr.write(f"\rgraphreg.sample: {done} of {self.n} passes")
            sys.stderr.flush()


@contextmanager
def _line(n: int, progress: bool | None) -> Iterator[_Line]:
    line = _Line(n, sys.stderr.isatty() if progress is None else progress)
    try:
        yield line
    finally:
        if line.shown:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
