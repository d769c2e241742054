"""``graphreg.effect`` measures how strongly each regularizer acts now: on the loss, on its gradient and on the model's output.

Each pass is a forward and a backward of the whole model, with all regularizers or without some of them. Passes with the same number of a
draw have the same masks (common random numbers), so that the difference of two passes is due to the regularizer that is left out.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, overload

import torch
from torch import Tensor, nn

from graphreg.errors import GraphRegError, RegularizerError, shown, warn
from graphreg.ir.module_record import RULES
from graphreg.ir.terminal import Lines, Paragraph, Printed, ProgressLine, progress_line
from graphreg.ir.text_table import Table
from graphreg.regularizer.base import Penalty, Splice
from graphreg.runtime.attach import AttachRule
from graphreg.runtime.result import Kept, Regularized
from graphreg.runtime.runtime_module import accumulation
from graphreg.session.hosts import BackendHost, backend_host, in_place_host, regularized, session_of
from graphreg.session.prox import prox_penalty
from graphreg.session.session import Session
from graphreg.session.strengths import OWN, Row
from graphreg.torch_internals import pytree
from graphreg.torch_internals.autograd import write_uncounted
from graphreg.torch_internals.distributed import is_distributed
from graphreg.torch_internals.dynamo import runs_compiled
from graphreg.torch_internals.modules import parameters_by_name
from graphreg.torch_internals.patching import Changes
from graphreg.tracing.fake_inputs import Arguments
from graphreg.tracing.proof.copies import copied_call
from graphreg.tracing.proof.surroundings import Generators, comparable_state

log = logging.getLogger("graphreg")
_WEAK, _STRONG, _BAR = 1e-3, 1.0, 12  # the pulls at which the bar is empty and full, and its length
_VANISHED = 0.01  # a loss whose gradient times the parameters is less than this, in units of the loss, has nearly no gradient
_TOO_FAR = 10.0  # a pull that tells of a vanished gradient, too


@dataclass(frozen=True)
class Effect:
    """How strongly one regularizer acts, at all its sites or at one.

    Attributes:
        name: The name of the regularizer.
        site: The name of the site; ``""`` for all sites together.
        strength: The current strength.
        adds: What the regularizer adds to the loss, on average over the draws: a penalty, its value; a splice, the loss with it minus the
            loss without it.
        pull: The norm of the gradient of what it adds, on average over the draws, divided by the norm of the gradient of the loss without
            any regularizer. Both are taken over the parameters that it reaches.
        jitter: For a splice, the spread of its gradient over the draws (the root of the sum of all variances), divided by the same norm;
            None for a penalty, and for one draw.
        output: For a splice, how much it changes the model's output: the root mean square of the change, divided by that of the output
            without it; None for a penalty, and for an output without floating-point tensors.
    """

    name: str
    site: str
    strength: float
    adds: float
    pull: float
    jitter: float | None
    output: float | None


class Effects(Printed, Sequence[Effect]):
    """The result of ``graphreg.effect``: a sequence of ``Effect``, which prints as a table.

    Attributes:
        title: The model's class name.
        rows: The rows.
        draws: The number of draws.
        loss: The loss without any regularizer.
        gradient: The norm of its gradient, over all parameters.
    """

    def __init__(self, title: str, rows: Sequence[Effect], draws: int, loss: float, gradient: float) -> None:
        self.title, self.rows, self.draws, self.loss, self.gradient = title, tuple(rows), draws, loss, gradient

    def __iter__(self) -> Iterator[Effect]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Effect: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Effect, ...]: ...
    def __getitem__(self, index: int | slice) -> Effect | tuple[Effect, ...]:
        return self.rows[index]

    def _blocks(self) -> Iterator[Paragraph]:
        draws = f"{self.draws} draw{'s' * (self.draws != 1)}"
        yield Lines((f"{self.title}: loss {self.loss:.3g} without regularizers, its gradient {self.gradient:.3g}; {draws}",), "bold")
        head = ("name", "site", "strength", "adds", "pull", f"{_WEAK:g} to {_STRONG:g}", "jitter", "output")
        yield Table(head, tuple((row.name, row.site, f"{row.strength:g}", *_cells(row)) for row in self.rows))

    def to_dict(self) -> dict[str, Any]:
        """Return the result as plain data."""
        rows = [asdict(row) for row in self.rows]
        return {"title": self.title, "draws": self.draws, "loss": self.loss, "gradient": self.gradient, "rows": rows}


def _cells(row: Effect) -> tuple[str, ...]:
    adds, pull, jitter, output = ("" if each is None else f"{each:.2g}" for each in (row.adds, row.pull, row.jitter, row.output))
    return adds, pull, _bar(row.pull), jitter, output


def _bar(pull: float) -> str:
    """Return a bar for a pull: its length is the logarithm of the pull."""
    if not pull > _WEAK:
        return ""
    return "#" * min(_BAR, math.ceil(_BAR * math.log(pull / _WEAK) / math.log(_STRONG / _WEAK)))


def effect(module: Any, loss: Callable[[Any], Tensor], *args: Any, draws: int = 8, by_site: bool = False, **kwargs: Any) -> Effects:
    """Measure how strongly each regularizer acts on a loss now, in train mode.

    A row has ``adds``, what the regularizer adds to the loss; ``pull``, the norm of the gradient of what it adds, relative to the
    gradient of the loss; and, for a splice (a regularizer that replaces a value, such as dropout), ``jitter``, how much its gradient
    varies from draw to draw, and ``output``, how much it changes the model's output. ``Effect`` has the formulas.

    The model is called with the same arguments each time. A first call checks them. For each draw, there is a call without any
    regularizer; if there are splices, a call with all regularizers; and a further call for each splice and for each penalty on values, or
    with ``by_site``, for each of their sites. A penalty on parameters takes one call for all draws, and a single splice needs no further
    call unless ``by_site`` is True.

    Nothing is trained, and no state changes: not parameters, gradients, buffers, modes, strengths, noise or global random generators.
    The model's own dropout acts in every call, and its hooks run in every call; an open monitor does not record these calls. A rewritten
    module runs in eager even if it is compiled; a model that was compiled with a backend runs its compiled graphs. ``effect`` needs memory
    for a copy of the parameters and buffers and, for each row, for one more gradient of all parameters. On several ranks, each rank
    measures on its own batch, and nothing is averaged over ranks.

    Args:
        module: A rewritten module, also compiled or in DistributedDataParallel, a model that is regularized in place, or a model compiled
            with a backend. The last two must have been called once in train mode.
        loss: A function of the model's output alone, without penalties, that returns the loss, a tensor with one number.
        *args: Positional arguments for a call of the model.
        draws: Over how many draws of the noise to average, 1 or more.
        by_site: Whether to measure each site by itself, in a row of its own. A regularizer whose formula takes all its sites at once still
            gets one row.
        **kwargs: Keyword arguments for the call.

    Returns:
        ``Effects``, a sequence of rows that prints as a table. For a splice, ``pull`` is corrected for sampling noise: the mean gradient
        of few draws has too large a norm, and the expected excess is subtracted.

    Raises:
        RegularizerError: An option is not allowed, or ``loss`` does not return a finite number that has a gradient.
        GraphRegError: graphreg did not regularize the module, it has no regularizers, or no graph for these arguments yet; its parameters
            are sharded; or the call is within ``with frozen_noise(...)``, ``noise_on``, ``noise_off`` or ``penalties_off``.
    """
    if not callable(loss):
        raise RegularizerError(f"loss={shown(loss)} is not allowed; give a function of the model's output: effect(module, loss, x).")
    if not isinstance(draws, int) or isinstance(draws, bool) or draws < 1:
        raise RegularizerError(f"draws={shown(draws)} is not allowed; draws is a whole number of 1 or more.")
    session, call, root = _host(module, args, kwargs)
    if session.noise_is_frozen or session.noise.state is not None or session.penalties.state is not None:
        raise GraphRegError(
            "effect draws several times, with and without each regularizer: call it outside of blocks of frozen_noise, noise_on, noise_off "
            "and penalties_off."
        )
    if any(map(is_distributed, parameters_by_name(root, once=True).values())):
        raise GraphRegError("effect needs whole gradients, and the parameters are sharded (DTensor). Call it before you shard the model.")

    if not any(parameter.requires_grad for parameter in parameters_by_name(root, once=True).values()):
        raise RegularizerError("no parameter of the model is trained, so nothing can pull. Call effect before you freeze all of them.")

    with Changes() as changes, changes, _eager(module, root), comparable_state(root) as generators:
        for rules in session.graphs():
            if rules.watching is not None:
                rules.watching.pause(changes)
        if (backend := backend_host(module)) is not None:
            changes.keep(backend, "last")
            changes.put(session, "attaches", False)
        passes = _Passes(session, call, (args, kwargs), loss, root, generators, changes)
        passes.first()
        now = session.now()
        rows = [_Row(row, site, strength) for row in session.strengths.values() for site, strength in _parts(row, now, by_site)]
        if not rows:
            raise GraphRegError(f"{type(root).__name__} has no regularizer whose effect could be measured.")
        return _measured(passes, rows, draws, type(root).__name__.removesuffix("Impl"))


def _host(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Session, Callable[..., tuple[Any, Any]], nn.Module]:
    """Return the session, a function that calls the model and returns its output and its penalties, and the module with the state."""
    session = session_of(module)
    if (backend := backend_host(module)) is not None:
        if isinstance(module, BackendHost):
            raise GraphRegError("effect calls the model: give it what torch.compile returned, not the backend.")
        if backend.model is None:
            raise GraphRegError("this model was not called yet, so the backend has no graph. Call it once in train mode.")
        return session, lambda *a, **k: (module(*a, **k), backend.last), backend.model
    root = regularized(module)
    if (placed := in_place_host(module)) is not None:
        placed.graph_for(root, args, kwargs)

    def call(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
        result = root(*args, **kwargs)
        return (result.output, result.penalties) if isinstance(result, (Regularized, Kept)) else (result, None)

    return session, call, root


def _eager(module: Any, root: nn.Module) -> AbstractContextManager[Any]:
    """Return a context in which a module runs without torch.compile; one that changes nothing for a model compiled with a backend."""
    compiled = backend_host(module) is None and any(map(runs_compiled, root.modules()))
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()


def _parts(row: Row, call: int, by_site: bool) -> Iterator[tuple[str, float]]:
    """Yield the sites of a regularizer that get a row, ``OWN`` for all together, each with its strength in a call."""
    if row.regularizer is None:  # the rates of native dropout
        return
    if by_site and row.planned:
        yield from row.numbers(call).items()
    else:
        yield OWN, row.furthest(call)


class _Mean:
    """The running mean of numbers and of lists of gradients, and the sum of the squared deviations of the gradients (Welford 1962)."""

    def __init__(self) -> None:
        self.n, self.value, self.squares = 0, 0.0, 0.0
        self.gradients: list[Tensor | None] = []  # None for a parameter that no gradient has reached

    def take(self, value: float, gradients: Sequence[Tensor | None]) -> None:
        self.n += 1
        self.value += (value - self.value) / self.n
        self.gradients = self.gradients or [None] * len(gradients)
        for i, gradient in enumerate(gradients):
            mean = self.gradients[i]
            if mean is None:
                if gradient is None or not gradient.any():  # compiled code gives zeros where nothing is reached
                    continue
                mean = self.gradients[i] = torch.zeros_like(gradient)
            away = -mean if gradient is None else gradient - mean
            mean += away / self.n
            self.squares += float((away * (away - away / self.n)).sum())

    @property
    def variance(self) -> float:
        """The sum of the variances of all elements of the gradients; 0 for one draw."""
        return self.squares / (self.n - 1) if self.n > 1 else 0.0


class _Row:
    """What is measured of one regularizer, at one site or (``OWN``) at all."""

    def __init__(self, row: Row, site: str, strength: float) -> None:
        assert row.regularizer is not None
        self.name, self.site, self.strength = row.name, site, strength
        self.is_splice, self.has_penalty = isinstance(row.regularizer, Splice), row.regularizer.has_penalty()
        # a penalty on parameters is the same in each draw
        self.varies = isinstance(row.regularizer, Penalty) and (row.regularizer.on == "values" or "noise" in row.regularizer.takes)
        self.spliced, self.penalty = _Mean(), _Mean()
        self.changed = self.before = 0.0  # the sums of squares of the output's change, and of the output without the splice
        self.without = {row.name: (site,)}
        others = tuple(each for each in row.planned if each != site) if site != OWN else ()
        self.others = {row.name: others} if others else {}

    def measure(self, passes: _Passes, draw: int, full: _Pass, none: _Pass | None) -> None:
        """Measure in one draw. ``full``: the pass with all regularizers; ``none``: that without the splice, if it was made already."""
        if self.is_splice:
            less = passes.run(draw, self.without) if none is None else none
            self.spliced.take(full.value - less.value, list(map(_difference, full.gradients, less.gradients)))
            for now, then in zip(full.output, less.output, strict=True):
                self.changed += float(torch.linalg.vector_norm(now - then)) ** 2
                self.before += float(torch.linalg.vector_norm(then)) ** 2
        if self.has_penalty and (self.varies or not draw):
            penalty = passes.run(draw, self.others, self.name)
            self.penalty.take(penalty.value, penalty.gradients)

    def passes(self, draws: int, none_is_made: bool) -> int:
        """Return how many passes ``measure`` makes in all draws."""
        return draws * (self.is_splice and not none_is_made) + (draws if self.varies else 1) * self.has_penalty

    def effect(self, loss: Sequence[Tensor | None]) -> Effect:
        """Return the row of the result. ``loss``: the gradients of the loss without regularizers."""
        found = [each for each in (self.spliced, self.penalty) if each.n]
        both = [_sum([each.gradients[i] for each in found]) for i in range(len(loss))]
        below = _norm([of_loss for of_loss, own in zip(loss, both, strict=True) if own is not None])
        above = math.sqrt(max(0.0, _norm(both) ** 2 - sum(each.variance / each.n for each in found)))
        jitter = _ratio(math.sqrt(self.spliced.variance), below) if self.spliced.n > 1 else None
        output = _ratio(math.sqrt(self.changed), math.sqrt(self.before)) if self.is_splice and (self.changed or self.before) else None
        adds = sum(each.value for each in found)
        return Effect(self.name, self.site, self.strength, adds, _ratio(above, below), jitter, output)


def _difference(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    """Return the difference of two gradients; None if there is none."""
    if one is None or other is None:
        return one if other is None else -other
    return None if torch.equal(one, other) else one - other


def _sum(gradients: Sequence[Tensor | None]) -> Tensor | None:
    found = [each for each in gradients if each is not None]
    return sum(found[1:], found[0]) if found else None


def _norm(tensors: Sequence[Tensor | None]) -> float:
    return math.hypot(*(float(torch.linalg.vector_norm(each.detach())) for each in tensors if each is not None))


def _ratio(above: float, below: float) -> float:
    return above / below if below else (math.inf if above else 0.0)


@dataclass(frozen=True)
class _Pass:
    """A pass: its loss or penalty, the gradients by that, each of the dtype of its parameter or wider, and the tensors of the output."""

    value: float
    gradients: list[Tensor | None]
    output: list[Tensor]


class _Passes:
    """Runs passes of a model. Each begins in the state that the model has now, and at the call number of its draw."""

    line: ProgressLine | None = None

    def __init__(
        self, session: Session, call: Callable[..., tuple[Any, Any]], arguments: Arguments, loss: Callable[[Any], Tensor], root: nn.Module,
        generators: Generators, changes: Changes,
    ) -> None:  # fmt: skip
        self.session, self.call, self.arguments, self.loss, self.generators, self.root = session, call, arguments, loss, generators, root
        self.parameters = [parameter for parameter in parameters_by_name(root, once=True).values() if parameter.requires_grad]
        self.state = self.drawn = session.saved()
        self.done, self.apart = 0, dict[str, Tensor]()
        changes.later(partial(session.load, self.state))
        for attach in (rules._modules.get("attach") for rules in session.graphs()):
            if isinstance(attach, AttachRule):
                changes.keep(attach, "last")
                changes.put(attach, "apart", self.apart)
        for module in root.modules():
            changes.later(partial(setattr, module, "training", module.training))
        if not root.training:  # a submodule that is in eval mode within a model in train mode stays so
            root.train()
        self.tensors = _State(root)
        changes.later(self.tensors.restore)

    def first(self) -> None:
        """Run a pass that only finds out what is wrong with the arguments, and which streams of noise there are."""
        self.run(0, {})
        self.drawn = self.session.saved()
        self.session.load(self.state)

    def run(self, draw: int, without: Mapping[str, Collection[str]], penalty: str = "") -> _Pass:
        """Run a pass without some regularizers, and differentiate the loss, or the penalty of this name."""
        if self.line is not None:
            self.line.at(self.done)
            self.done += 1
        self.session.load(self._state_at(draw))
        self.generators.rewind()
        torch.manual_seed(draw)  # native dropout
        self.apart.clear()
        args, kwargs = copied_call(self.arguments, {})
        with self.session.without(without):
            output, penalties = self.call(*args, **kwargs)
            if not penalty:
                value = self._checked(self.loss(output))
            elif self.session.strengths[penalty].regularizer.by_prox:  # type: ignore[union-attr]
                value = prox_penalty(self.root, penalty)
            else:
                value = (self.apart if penalties is None else penalties)[penalty]
            gradients: Sequence[Tensor | None] = [None] * len(self.parameters)
            if value.requires_grad:  # a penalty may have no parameter that is trained
                gradients = torch.autograd.grad(value.sum(), self.parameters, allow_unused=True)
        self.tensors.restore()
        found = [leaf.detach() for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        return _Pass(float(value.detach()), [None if each is None else _wide(each) for each in gradients], list(map(_wide, found)))

    def _state_at(self, draw: int) -> dict[str, Any]:
        """Return the state of the noise for a draw: later calls than the present one, in which schedules have their present strengths."""
        if "calls" not in self.state:
            return {**self.state, "call": self.state["call"] + draw}
        # of a backend, where a stream may draw several times in a call
        calls, after = self.state["calls"], self.drawn["calls"]
        calls = {text: (first := calls.get(text, 0)) + draw * (after[text] - first) for text in after}
        return {**self.state, "calls": calls}

    def _checked(self, value: Any) -> Tensor:
        if not isinstance(value, Tensor) or value.numel() != 1 or not value.is_floating_point():
            what = f"a tensor {list(value.shape)} of {value.dtype}" if isinstance(value, Tensor) else shown(value)
            raise RegularizerError(f"loss gave {what}; it takes the model's output, and must return one floating-point number.")
        if not value.requires_grad:
            raise RegularizerError("the loss has no gradient: compute it from the output, without detach(), and train a parameter.")
        if not bool(value.isfinite()):
            raise RegularizerError(f"the loss is {value.item():g}, and nothing can be compared with it. Give a call whose loss is finite.")
        return value


def _wide(tensor: Tensor) -> Tensor:
    """Return a tensor as a dense one, without a gradient, in float32 or float64."""
    dense = tensor.detach() if tensor.layout is torch.strided else tensor.detach().to_dense()
    return torch.view_as_real(dense.resolve_conj()) if dense.is_complex() else dense.to(accumulation(dense.dtype))


class _State:
    """What a forward may change in a model: which objects are attributes, and the contents of tensors, lists, dicts and sets."""

    def __init__(self, root: nn.Module) -> None:
        modules = [module for name, module in root.named_modules() if name.partition(".")[0] != RULES]
        self.attributes = [(space, dict(space)) for module in modules for space in (vars(module), module._buffers)]
        own = [value for module in modules for name, value in vars(module).items() if not name.startswith("_")]
        self.containers = [(each, copy(each)) for each in own if type(each) in (list, dict, set)]
        # also parameters: an embedding with ``max_norm`` writes into its weight
        tensors = [each for module in modules for each in (*module._buffers.values(), *module._parameters.values())]
        written = {id(each): each for each in (*tensors, *own) if isinstance(each, Tensor)}
        self.tensors = [(each, each.detach().clone()) for each in written.values()]

    def restore(self) -> None:
        for container, before in self.containers:
            if container != before:
                container.clear()
                container.extend(before) if isinstance(container, list) else container.update(before)
        for space, before in self.attributes:
            for key in [key for key, value in space.items() if before.get(key, space) is not value]:
                del space[key]
            space.update({key: value for key, value in before.items() if key not in space})
        with torch.no_grad():
            for tensor, before in self.tensors:
                if not torch.equal(tensor, before):
                    write_uncounted(tensor, before)


def _measured(passes: _Passes, rows: Sequence[_Row], draws: int, title: str) -> Effects:
    none = {row.name: (OWN,) for row in rows if row.is_splice}
    alone = [row.without == none for row in rows]  # without the only splice, there is none
    count = draws * (1 + bool(none)) + sum(row.passes(draws, only) for row, only in zip(rows, alone, strict=True))
    log.info("effect: %d passes, each a forward and a backward", count + 1)  # with that of ``first``

    plain = _Mean()
    with progress_line("graphreg.effect", count) as passes.line:
        for draw in range(draws):
            base = passes.run(draw, none)
            plain.take(base.value, base.gradients)
            full = passes.run(draw, {}) if none else base
            for row, only in zip(rows, alone, strict=True):
                row.measure(passes, draw, full, base if only else None)

    result = Effects(title, [row.effect(plain.gradients) for row in rows], draws, plain.value, _norm(plain.gradients))
    furthest = max(result, key=lambda row: row.pull)
    if result.gradient * _norm(passes.parameters) < _VANISHED * max(1.0, abs(plain.value)) or furthest.pull > _TOO_FAR:
        warn(
            f"effect: the gradient of the loss has nearly vanished: its norm is {result.gradient:.2g}, and {furthest.name} pulls "
            f"{furthest.pull:.2g} times as strongly. On a batch that the model already fits, every pull is large. Measure earlier in "
            "training, after about 20 steps, or on a batch that the model does not fit yet."
        )
    return result
