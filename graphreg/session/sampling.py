"""``graphreg.sample``: mean and spread of a module's output over many passes with the noise on (Gal & Ghahramani 2016)."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from graphreg.errors import GraphRegError, RegularizerError, first_line, shown
from graphreg.ir.module_record import RULES
from graphreg.ir.precision import widest
from graphreg.ir.terminal import progress_line
from graphreg.runtime.result import output_of
from graphreg.runtime.unfinished import begin_counting, end_counting, take_back
from graphreg.session.controls import noise_on
from graphreg.session.entropies import Entropies, Of, tensor_of
from graphreg.session.hosts import backend_host, session_of
from graphreg.session.session import Session
from graphreg.torch_internals import pytree
from graphreg.torch_internals.modules import buffers_by_name
from graphreg.torch_internals.patching import Changes
from graphreg.tracing.fake_inputs import arguments

QUANTILE_LIMIT = 2**24  # torch.quantile takes no more numbers


@dataclass(frozen=True)
class Samples:
    """The result of ``sample``. Mean, spread, variance and outputs have the structure of the model's output.

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
    _entropies: Entropies | None = field(default=None, repr=False)

    def __repr__(self) -> str:
        shapes = ", ".join(str(list(t.shape)) if isinstance(t, Tensor) else repr(t) for t in pytree.tree_leaves(self.mean))
        spreads = [t.mean() for t in pytree.tree_leaves(self.spread) if isinstance(t, Tensor)]
        return f"Samples(n={self.n}, mean: {shapes}, spread: {', '.join(f'{float(s):.3g}' for s in spreads)} on average)"

    @property
    def variance(self) -> Any:
        """The square of the spread."""
        return pytree.tree_map_only(Tensor, Tensor.square, self.spread)

    def entropy(self, dim: int = -1, logits: bool = True, of: Of | None = None) -> Tensor:
        """Return the entropy of the predicted probabilities, averaged over the passes, in nats: the whole uncertainty of a prediction.

        Formula: ``H(mean p)``, where H(p) is ``-sum p log p`` over the classes, and p the probabilities of one pass. If the outputs were
        not kept, the arguments must be those in ``entropy=`` of ``sample``.

        Args:
            dim: The axis of the classes in one output.
            logits: True if the output has logits (p is then their softmax), False if it has probabilities.
            of: If the output is not a single tensor, where the logits or probabilities are: the name of a field or key, or a function of
                the output of one pass.

        Returns:
            The shape of one output without ``dim``, float32 or wider.

        Raises:
            RegularizerError: An argument is not allowed, the values are not probabilities, or the outputs were not kept.

        Source: Gal, Uncertainty in deep learning, PhD thesis, Cambridge (2016), section 3.3.1.
        """
        return self._entropies_of(dim, logits, of).whole

    def mutual_information(self, dim: int = -1, logits: bool = True, of: Of | None = None) -> Tensor:
        """Return the mutual information of the prediction and the noise, in nats: that part of the entropy on which passes disagree.

        Formula: ``H(mean p) - mean H(p)``. The second term is the entropy that is left within a pass.

        Args:
            dim: As in ``entropy``.
            logits: As in ``entropy``.
            of: As in ``entropy``.

        Returns:
            The shape of one output without ``dim``, float32 or wider, 0 or more.

        Raises:
            RegularizerError: As in ``entropy``.

        Source: Houlsby et al., Bayesian active learning for classification and preference learning, arXiv:1112.5745 (2011), equation 2.
        """
        entropies = self._entropies_of(dim, logits, of)
        # rounding could make it a little less than 0
        return (entropies.whole - entropies.within).relu()

    def quantile(self, q: float | Sequence[float], of: Of | None = None) -> Tensor:
        """Return quantiles over the passes, with linear interpolation, as ``torch.quantile`` does.

        Args:
            q: A number in [0, 1], or several.
            of: As in ``entropy``; a function may also compute something, such as probabilities.

        Returns:
            The shape of one output; for several numbers with an axis for them in front. float32 or wider.

        Raises:
            RegularizerError: An argument is not allowed, or the outputs were not kept.
        """
        several = isinstance(q, (list, tuple))
        numbers = list(q) if isinstance(q, (list, tuple)) else [q]
        if not numbers or not all(isinstance(each, (int, float)) and 0 <= each <= 1 for each in numbers):
            raise RegularizerError(f"q={shown(q)} is not allowed; give a number in [0, 1], or a list of such numbers.")
        values = torch.stack([_wide(tensor_of(output, of)) for output in self._passes("quantile")])
        at = torch.tensor(numbers, dtype=values.dtype, device=values.device)
        if not values.numel():
            return values.new_empty((*((len(numbers),) if several else ()), *values.shape[1:]))
        pieces = torch.split(values.flatten(1), max(1, QUANTILE_LIMIT // self.n), 1)
        found = torch.cat([torch.quantile(piece, at, 0) for piece in pieces], 1).view(-1, *values.shape[1:])
        return found if several else found[0]

    def _entropies_of(self, dim: int, logits: bool, of: Of | None) -> Entropies:
        if self.outputs is None and self._entropies is not None:
            self._entropies.require_same(dim, logits, of)
            return self._entropies
        entropies = Entropies(dim, logits, of)
        for output in self._passes("entropy"):
            entropies.take(output)
        return entropies

    def _passes(self, method: str) -> Iterator[Any]:
        """Yield the output of each pass."""
        if self.outputs is None:
            streamed = ", or entropy={'dim': 1} with the arguments of Samples.entropy" if method == "entropy" else ""
            raise RegularizerError(f"the outputs were not kept (keep=False), and {method} needs them. Give sample keep=True{streamed}.")
        for i in range(self.n):
            yield pytree.tree_map_only(Tensor, operator.itemgetter(i), self.outputs)


def sample(
    module: nn.Module, inputs: Any, n: int, *, keep: bool = True, progress: bool | None = None, at_once: int = 1,
    entropy: Mapping[str, Any] | None = None,
) -> Samples:  # fmt: skip
    """Run ``n`` passes of a module in eval mode, but with its noise on, and without gradients. Afterwards all modes are as before.

    Args:
        module: A rewritten module, also compiled or wrapped, or a model that is regularized in place. Each pass is a call with masks of
            its own.
        inputs: A tensor, a tuple (positional arguments) or a dict (keyword arguments).
        n: The number of passes, 1 or more.
        keep: Whether to return all outputs. ``False`` keeps in memory only what mean and spread need (Welford 1962).
        progress: Whether to show a line of progress on stderr; None shows it if stderr is a terminal.
        at_once: How many passes to run in one call, by ``torch.vmap``. Each draws the masks that it draws in a call of its own, so outputs
            differ by rounding alone. What the model computes before the first noise is then computed once. It takes the memory of so many
            passes, and runs in eager, also if the module is compiled.
        entropy: The arguments of ``Samples.entropy``, as a dict such as ``{"dim": 1}``: with ``keep=False``, what entropy and mutual
            information need is then summed up pass by pass.

    Raises:
        RegularizerError: An argument is out of its range.
        GraphRegError: The module draws no noise; or, with ``at_once``, an operation of the model is not possible under ``torch.vmap``, or
            the model writes into a buffer.
    """
    for name, number, what in (("n", n, "the number of passes"), ("at_once", at_once, "the number of passes in one call")):
        if not isinstance(number, int) or isinstance(number, bool) or number < 1:
            raise RegularizerError(f"{name}={shown(number)} is not allowed; {name} is {what}, a whole number of 1 or more.")
    if progress is not None and not isinstance(progress, bool):
        raise RegularizerError(
            f"progress={shown(progress)} is not allowed; give True, False, or None to show a line if stderr is a terminal."
        )
    entropies = None if entropy is None else Entropies.asked(entropy)
    session = session_of(module)
    session.require_draws()
    call = arguments(inputs, "inputs")
    if call is None:
        raise RegularizerError("inputs=None is not allowed; give a tensor, a tuple (positional) or a dict (keyword).")
    if at_once > 1 and backend_host(module) is not None:
        raise GraphRegError("at_once is not possible with a backend, whose graphs are compiled. Leave it out, or use graphreg.regularize.")

    def run() -> Any:
        return output_of(module(*call[0], **call[1]))

    running = _Running()
    # Eval mode, so that batch norm uses the statistics of training, as in a prediction.
    with _evaluating(module), noise_on(module), torch.no_grad(), progress_line("graphreg.sample", n, progress) as line:
        for done in range(0, n, at_once):
            line.at(done)
            passes = min(at_once, n - done)
            for output in [run()] if at_once == 1 else _at_once(run, module, session, passes):
                running.take(output, keep)
                if entropies is not None:
                    entropies.take(output)
    return dataclasses.replace(running.samples(), _entropies=entropies)


def _at_once(run: Callable[[], Any], module: nn.Module, session: Session, passes: int) -> Iterator[Any]:
    """Run several passes in one call, and yield the output of each."""
    rest = list[Any]()
    spec: pytree.TreeSpec = pytree.treespec_leaf()

    def one(*keys: Tensor) -> list[Tensor]:
        nonlocal rest, spec
        with Changes() as changes, changes:
            for counter, key in zip(counters, keys, strict=True):
                changes.put(vars(counter), "several", key)
            rest, spec = pytree.tree_flatten(run())
        return [leaf for leaf in rest if isinstance(leaf, Tensor)]

    before = [(name, buffer, buffer.clone()) for name, buffer in buffers_by_name(module, once=True).items() if RULES not in name.split(".")]
    counters, outer = session.streams.counters(), begin_counting()
    try:
        # The numbers of the calls are taken one by one, as in a loop, and given back if the call fails.
        keys = [torch.stack([counter.of_call(True) for _ in range(passes)]) for counter in counters]
        # A penalty on derivatives cannot be computed under vmap, and nobody reads it here.
        with session.penalties_off(), torch.compiler.set_stance("force_eager"):
            tensors = torch.vmap(one, randomness="same")(*keys)
        if changed := [(name, buffer, value) for name, buffer, value in before if not torch.equal(buffer, value)]:
            take_back()
            for _, buffer, value in changed:
                buffer.copy_(value)
            raise GraphRegError(
                f"at_once={passes}: the model writes into {changed[0][0]} in eval mode, too, so each pass depends on those before it. "
                "Leave at_once out."
            )
    except RuntimeError as error:
        take_back()
        raise GraphRegError(
            f"at_once={passes}: the model cannot run under torch.vmap ({first_line(error).rstrip('.')}). Leave at_once out."
        ) from error
    finally:
        end_counting(outer)
    for i in range(passes):
        rows = iter([tensor[i] for tensor in tensors])
        yield pytree.tree_unflatten([next(rows) if isinstance(leaf, Tensor) else leaf for leaf in rest], spec)


def _wide(tensor: Tensor) -> Tensor:
    """Return a tensor in float32 or wider, or as it is if it is complex."""
    if tensor.is_complex():
        return tensor
    return tensor.to(torch.float32 if tensor.is_floating_point() and tensor.dtype != torch.float64 else widest(tensor.device))


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
        values = [_wide(t) for t in tensors]
        if self.n == 1:
            self.mean, self.squares = values, [torch.zeros_like(v.real) for v in values]
        for i, value in enumerate(values):
            # Welford: the deviation from the mean before this pass, times that from the mean after
            # it.
            # The logit of a class that is masked is -inf in all passes.
            away = torch.where(value == self.mean[i], 0, value - self.mean[i])
            self.mean[i] = self.mean[i] + away / self.n
            after = torch.where(value == self.mean[i], 0, value - self.mean[i])
            self.squares[i] = self.squares[i] + (away * after.conj()).real
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
