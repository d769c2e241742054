"""``ClockRule``, the runtime module at the top of a graph that counts the calls in train mode and returns the strengths of this call.

It returns one tensor with all strengths that have a schedule. For each regularizer, the tensor has one element for the regularizer's own
strength, and one for each of its sites. Each element has a schedule of its own. If the user sets a strength to a number, its element gets
a schedule with that one value.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from graphreg.errors import warn
from graphreg.ir.precision import brought, has_float64
from graphreg.runtime.counter import Counter, SharedCounter, taking
from graphreg.schedules import Schedule, constant
from graphreg.torch_internals.dynamo_marks import assume_constant_result

CLOCK = "clock"  # the name of the runtime module, and of the argument by which other runtime modules get its result


@dataclass(frozen=True)
class ScheduledElement:
    """What a scheduled strength is for.

    Attributes:
        regularizer: The name of the regularizer.
        site: The name of the site; ``""`` for the strength at all sites that have none of their own.
        planned: The strength in the plan. Two graphs share the element of a site only if they plan the same strength there: ``by_depth``
            plans another one if a model grows.
    """

    regularizer: str
    site: str
    planned: float



@assume_constant_result
def _warn_of_export() -> None:
    """Warn, once per export, that the program has the same strengths in each call."""
    warn(
        "this module is exported in train mode, and the program will have the scheduled strengths of this call in each call. Export it in "
        "eval mode (module.eval()), or export graphreg.strip(module)."
    )


class ClockRule(Counter):
    """Returns the scheduled strengths of this call and makes those of the next. It counts the calls of the whole module in train mode.

    Attributes:
        names: For each element, the regularizer and the site whose strength it is.
        schedules: The schedule of each element.
        numbers: The pieces of the schedules as numbers, float64 [elements, pieces, 6], or float32 on a device without float64.
        now: The strengths of the next call, [elements], in the dtype of ``numbers``.
    """

    product = "now"
    in_backward_text = (
        "this module runs inside a backward pass, and its clock has moved on since the forward: activation checkpointing around the whole "
        "module would compute with the strengths of another call. Put forward and backward into one block of "
        "graphreg.frozen_noise(module), or checkpoint only blocks inside the model, and call torch.compile on the whole module."
    )
    jit_text = (
        "torch.jit.trace would freeze the scheduled strengths of this call, and use them in every call. Trace the module in eval mode "
        "(module.eval()), or trace graphreg.strip(module)."
    )
    lent_text = (
        "torch.func.functional_call was given the clock of the module's schedules: it would not advance. Leave out the names that begin "
        "with 'graphreg_rules.': {n: b for n, b in module.named_buffers() if 'graphreg_rules.' not in n}."
    )
    path = ""  # the root: a call of the whole model is one step
    moves_key = False
    _is_impure = True  # otherwise torch.fx takes a node without users for dead code
    numbers: Tensor
    now: Tensor

    def __init__(self, schedules: Mapping[ScheduledElement, float], device: torch.device | None = None) -> None:
        super().__init__("the clock of the schedules")
        self.names: tuple[ScheduledElement, ...] = ()
        self.schedules: tuple[Schedule, ...] = ()
        self.to(device or torch.device("cpu"))
        for name in ("numbers", "now"):
            self.register_buffer(name, None, persistent=False)
        self.extend(schedules)

    def places(self, elements: Iterable[ScheduledElement]) -> tuple[int, ...]:
        """Return where elements are in what the clock returns."""
        return tuple(map(self.names.index, elements))

    def extend(self, schedules: Mapping[ScheduledElement, float]) -> None:
        """Add those elements that are new. A number is a schedule with one value."""
        new = {element: constant(value) for element, value in schedules.items() if element not in self.names}
        if new or not self.names:
            self.names, self.schedules = (*self.names, *new), (*self.schedules, *new.values())
            self._write(self.schedules)

    @property
    def room(self) -> int:
        """How many pieces a schedule may have without a change of the shape of ``numbers``."""
        return self.numbers.shape[1]

    def takes(self, name: str) -> bool:
        """Whether the strengths of a regularizer may be schedules."""
        return any(element.regularizer == name for element in self.names)

    def set(self, name: str, value: Callable[[ScheduledElement], float]) -> None:
        """Replace the schedules of a regularizer. Nothing is recompiled, unless a schedule has more pieces than ``room``.

        ``value``: the new strength of an element.
        """
        new = {i: constant(value(element)) for i, element in enumerate(self.names) if element.regularizer == name}
        with taking(), torch.inference_mode(False):  # no call counts meanwhile, and compiled code may save the tensors for backward
            self.schedules = tuple(new.get(i, old) for i, old in enumerate(self.schedules))
            if max((len(schedule.pieces) for schedule in new.values()), default=0) > self.room:  # only in a copy without graphs
                self._write(self.schedules)
                return
            numbers = self.numbers.clone()
            for place, schedule in new.items():
                numbers[place] = _table([schedule], self.room).to(numbers)[0]
            self._take(numbers)

    def present_call(self) -> int:
        """Return the number of the call whose strengths ``now`` has."""
        return int(self.step) if self.frozen_call is None else self.frozen_call

    def has_moved(self) -> None:
        """If the numbers are in float32, but now on a device that has float64, write them anew from the schedules."""
        if self.numbers.dtype != torch.float64 and has_float64(self.numbers.device):
            self._write(self.schedules)

    def _write(self, schedules: Sequence[Schedule]) -> None:
        pieces = max((len(schedule.pieces) for schedule in schedules), default=1)
        self._take(brought(_table(schedules, pieces), self.step.device))

    def _take(self, numbers: Tensor) -> None:
        self._buffers["numbers"] = numbers
        step = self.step if self.frozen_call is None else torch.full_like(self.step, self.frozen_call)
        self._buffers["now"] = self.made(step)

    def made(self, step: Tensor) -> Tensor:
        return strengths_at(self.numbers, step)

    def made_unless_frozen(self, step: Tensor, present: Tensor) -> Tensor:
        return torch.where(self.free > 0, self.made(step), present)

    def warn_of_export(self) -> None:
        _warn_of_export()

    def counts(self) -> bool:
        """Whether a call is counted, given the present modes and the open blocks of ``noise_on`` and ``noise_off``."""
        return self.owner[0].training and not self.forced and not self.silenced

    def forward(self) -> Tensor:
        """Return the strengths of this call, [elements]."""
        return self.of_call(self.counts())


class SharedClock(SharedCounter):
    """Stands in one graph for the clock that several graphs share."""

    path = ""
    moves_key = False
    _is_impure = True
    shared: tuple[ClockRule]

    def counts(self) -> bool:
        """Whether a call of this graph is counted, as in ``ClockRule.counts``."""
        clock = self.shared[0]
        return self.owner[0].training and not clock.forced and not clock.silenced

    def forward(self) -> Tensor:
        """Return the strengths of this call, [elements]."""
        return self.shared[0].of_call(self.counts())


def clock_of(rules: Any) -> ClockRule | None:
    """Return the clock that counts the calls of a graph, given the container of its runtime modules; None if there is no schedule."""
    clock = rules._modules.get(CLOCK)
    if isinstance(clock, SharedClock):
        return clock.shared[0]
    return clock if isinstance(clock, ClockRule) else None


def scheduled_elements(rules: Any) -> dict[str, list[ScheduledElement]]:
    """Return the elements of the clock's result that a graph reads, by regularizer, given the container of its runtime modules."""
    rows = rules.session.strengths
    return {
        name: [ScheduledElement(name, site, each) for site, each in planned.items()] or [ScheduledElement(name, "", rows[name].own)]
        for name, planned in rules.planned_strengths.items() if name not in rules.strengths
    }  # fmt: skip


def set_to_zero(rules: Any) -> None:
    """Set all strengths that a graph reads to 0, and leave the session's table of strengths unchanged."""
    for strength in rules.strengths.values():
        strength.zero_()
    if (clock := clock_of(rules)) is not None:
        for name in {element.regularizer for element in clock.names}:
            clock.set(name, lambda element: 0.0)


def strengths_at(numbers: Tensor, step: Tensor) -> Tensor:
    """Return the strength of each schedule at a call, [elements].

    ``numbers``: the schedules, [elements, pieces, 6]. ``step``: the number of the call, int64 [1]; it is converted before it is divided,
    because torch divides integers in float32. ``Piece.at`` computes the same in Python, with the same operations.
    """
    begin, steps, start, stop, is_cosine, every = numbers.unbind(-1)
    step = (step.to(numbers.dtype) / every).floor()
    # How far each piece has come, as if there were no other; ``last`` then picks one of each
    # element.
    share = ((step - begin) / steps).clamp(0, 1)
    share = torch.where(is_cosine > 0, (1 - torch.cos(math.pi * share)) / 2, share)
    last = (begin <= step).sum(-1, keepdim=True) - 1  # the last piece that has begun
    return (start + (stop - start) * share).gather(-1, last).squeeze(-1)


def _table(schedules: Sequence[Schedule], pieces: int) -> Tensor:
    """Return schedules as numbers, float64 [schedules, pieces, 6]. A schedule with fewer pieces gets more that never begin."""
    rows = [[[*piece, schedule.every] for piece in schedule.pieces] for schedule in schedules]
    never = [math.inf, 1, 0, 0, 0, 1]
    filled = [row + [never] * (pieces - len(row)) for row in rows]
    return torch.tensor(filled, dtype=torch.float64, device="cpu").reshape(len(filled), pieces, 6)
