"""Schedules are strengths that change while a model trains. Give a schedule in place of a number.

    module = graphreg.regularize(model, hidden_dropout=schedules.linear(0, 0.5, 10_000),
    weight_l2=schedules.cosine(1e-3, 0, 10_000))

A rewritten module counts its calls in train mode, from 0, and computes its strengths from this
count. A call in eval mode or in a block of ``noise_on`` or ``noise_off`` does not count. All calls
in a block of ``frozen_noise`` count as one. ``rng_state`` saves the count. With gradient
accumulation over k calls, give ``every=k``, so that a step of the schedule is k calls.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, NoReturn

from graphreg.errors import RegularizerError, number_of, shown

KINDS = ("linear", "cosine", "piecewise")
_MOST_STEPS = 2**53  # float64 represents every whole number up to this one exactly


class Piece(NamedTuple):
    """A part of a schedule. The strength goes from ``start`` at step ``begin`` to ``stop`` at step ``begin + steps``, and then stays.

    ``is_cosine``: whether the strength follows half a cosine wave, and not a straight line. The piece
    ends where the next piece begins.
    """

    begin: int
    steps: int
    start: float
    stop: float
    is_cosine: bool

    def at(self, step: int) -> float:
        """Return the strength at a step, computed with the same operations as in ``runtime/clock.py``."""
        # Before it begins and after it ends, a piece has the value of that end.
        share = min(max((step - self.begin) / self.steps, 0.0), 1.0)
        share = (1 - math.cos(math.pi * share)) / 2 if self.is_cosine else share
        return self.start + (self.stop - self.start) * share


class VaryingStrength(float):
    """Base class of strengths that differ by call or by site. As a float, such a strength is its value furthest from 0."""


class Schedule(VaryingStrength):
    """A strength that depends on the number of calls in train mode; ``linear``, ``cosine`` and ``piecewise`` make one.

    A schedule prints as the call that made it. Python arithmetic with a schedule raises an error.
    Where Python or torch needs a number, as in ``abs`` or in an operation with a tensor, the number
    is the value of the schedule that is furthest from 0.

    Attributes:
        kind: The name of the function that makes the schedule: ``"linear"``, ``"cosine"`` or
            ``"piecewise"``.
        values: The first and the last value; for ``piecewise``, all values in the order of their
            steps.
        steps: The number of steps from the first value to the last, in a tuple; for ``piecewise``,
            the step from which on each value holds.
        every: The number of calls in train mode that are one step.
    """

    kind: str
    values: tuple[float, ...]
    steps: tuple[int, ...]
    every: int

    def __new__(cls, kind: str, values: tuple[float, ...], steps: tuple[int, ...], every: int = 1) -> Schedule:
        self = super().__new__(cls, max(values, key=abs))
        self.kind, self.values, self.steps, self.every = kind, values, steps, every
        return self

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """The parts of the schedule, in the order of their steps."""
        if self.kind == "piecewise":
            return tuple(Piece(step, 1, value, value, False) for step, value in zip(self.steps, self.values, strict=True))
        # The second piece holds ``stop`` exactly; the first may miss it by rounding.
        (start, stop), (steps,) = self.values, self.steps
        return Piece(0, steps, start, stop, self.kind == "cosine"), Piece(steps, 1, stop, stop, False)

    @property
    def form(self) -> tuple[Any, ...]:
        """The kind, steps and ``every`` of the schedule. Schedules of one form differ only in their values."""
        return self.kind, self.steps, self.every

    def at(self, call: int) -> float:
        """Return the strength in call number ``call`` in train mode, counted from 0. Raises RegularizerError if ``call`` is negative."""
        if call < 0:
            raise RegularizerError(f"the call {call} of {self!r} does not exist; calls are numbered from 0.")
        step = call // self.every
        # The last piece that has begun. The first one begins at 0, so there is one.
        return next(piece for piece in reversed(self.pieces) if piece.begin <= step).at(step)

    def with_values(self, values: tuple[float, ...]) -> Schedule:
        """Return a schedule with these values, and with the kind, steps and ``every`` of this one."""
        return Schedule(self.kind, values, self.steps, self.every)

    def to_plain(self) -> dict[str, Any]:
        """Return the schedule as a dict of text, numbers and lists. ``of_plain`` converts the dict back to the schedule."""
        arguments: list[Any] = [*self.values, *self.steps]
        if self.kind == "piecewise":
            arguments = [list(pair) for pair in zip(self.steps, self.values, strict=True)]
        return {self.kind: arguments} | ({"every": self.every} if self.every > 1 else {})

    def __repr__(self) -> str:
        every = f", every={self.every}" if self.every > 1 else ""
        if self.kind == "piecewise":
            pairs = ", ".join(f"{step}: {_text(value)}" for step, value in zip(self.steps, self.values, strict=True))
            return f"piecewise({{{pairs}}}{every})"
        return f"{self.kind}({_text(self.values[0])}, {_text(self.values[1])}, {self.steps[0]}{every})"

    __str__ = __repr__

    def __format__(self, spec: str) -> str:
        """Return ``repr(self)``, also for the format of a number, such as ``g``."""
        return repr(self)

    def __getnewargs__(self) -> Any:
        return self.kind, self.values, self.steps, self.every

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Schedule) and self.__getnewargs__() == other.__getnewargs__()

    # without this, float.__ne__ would compare only the numbers
    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(self.__getnewargs__())

    def _no_arithmetic(self, *others: object) -> NoReturn:
        raise RegularizerError(f"{self!r} is a schedule, and cannot be computed with. Give other numbers to schedules.{self.kind}.")

    # The arithmetic of float would go on with the value furthest from 0, and lose the schedule.
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = _no_arithmetic
    __floordiv__ = __rfloordiv__ = __mod__ = __rmod__ = __pow__ = __rpow__ = __neg__ = _no_arithmetic


def linear(start: float, stop: float, steps: int, *, every: int = 1) -> Schedule:
    """Return a strength that goes from ``start`` to ``stop`` in ``steps`` steps, along a straight line, and then stays.

    At step t < steps, the strength is start + (stop - start) t / steps.

    Args:
        start: The strength in the first call in train mode.
        stop: The strength from step ``steps`` on.
        steps: A whole number, 1 or more.
        every: The number of calls in train mode that are one step: k for gradient accumulation over
            k calls.

    Raises:
        RegularizerError: An argument is not allowed.
    """
    return _ramp("linear", start, stop, steps, every)


def cosine(start: float, stop: float, steps: int, *, every: int = 1) -> Schedule:
    """Return a strength that goes from ``start`` to ``stop`` in ``steps`` steps, along half a wave of the cosine, and then stays.

    At step t < steps, the strength is start + (stop - start) (1 - cos(pi t / steps)) / 2. It
    changes slowly at both ends.

    The arguments are those of ``linear``.

    Raises:
        RegularizerError: An argument is not allowed.
    """
    return _ramp("cosine", start, stop, steps, every)


def piecewise(values: Mapping[int, float], *, every: int = 1) -> Schedule:
    """Return a strength that changes at given steps: ``piecewise({0: 0.0, 1000: 0.1, 5000: 0.2})``.

    Args:
        values: A dict of steps to strengths. A strength holds from its step until the next step in
            the dict. One of the steps is 0.
        every: The number of calls in train mode that are one step: k for gradient accumulation over
            k calls.

    Raises:
        RegularizerError: An argument is not allowed.
    """
    usage = "write piecewise({0: 0.0, 1000: 0.1}): steps and strengths"
    if not isinstance(values, Mapping) or not values:
        raise RegularizerError(f"piecewise: values={shown(values)} is not allowed; {usage}.")
    if wrong := [step for step in values if not _is_whole(step, 0)]:
        raise RegularizerError(f"piecewise: the step {shown(wrong[0])} is not allowed; a step is a whole number, 0 or more.")
    if 0 not in values:
        raise RegularizerError(f"piecewise: the strength before step {min(values)} is not given; {usage}, one of them from step 0 on.")
    steps = tuple(sorted(values))
    numbers = tuple(_number("piecewise", f"the strength from step {step} on", values[step]) for step in steps)
    # A step may be a number of numpy's, which JSON cannot write.
    return Schedule("piecewise", numbers, tuple(map(int, steps)), _count("piecewise", "every", every))


def constant(value: float) -> Schedule:
    """Return a schedule that has the value ``value`` in all calls. If ``value`` is a schedule already, return it unchanged."""
    return value if isinstance(value, Schedule) else Schedule("piecewise", (float(value),), (0,))


def of_plain(data: Any) -> Schedule | None:
    """Convert data that ``Schedule.to_plain`` returned back to the schedule; return None for data of any other form.

    Raises:
        RegularizerError: The data has the form of a schedule, but a number in it is not allowed.
    """
    kinds = [kind for kind in KINDS if isinstance(data, Mapping) and isinstance(data.get(kind), (list, tuple))]
    # ``linear`` may also be the selector of a module, in a dict of selectors to numbers.
    if len(kinds) != 1 or not data.keys() <= {kinds[0], "every"}:
        return None
    kind, given, every = kinds[0], data[kinds[0]], data.get("every", 1)
    if kind == "piecewise":
        if not all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in given):
            raise RegularizerError(f"piecewise={shown(given)} is not allowed; give a list of pairs [step, strength].")
        steps = [step for step, _ in given]
        if not all(_is_whole(step, 0) for step in steps) or len({*steps}) < len(steps):
            raise RegularizerError(f"piecewise={shown(given)} is not allowed; each step is a whole number, 0 or more, and occurs once.")
        return piecewise(dict(map(tuple, given)), every=every)
    if len(given) != 3:
        raise RegularizerError(f"{kind}={shown(given)} is not allowed; give a list [start, stop, steps], such as [0, 0.5, 1000].")
    start, stop, steps = given
    return _ramp(kind, start, stop, steps, every)


def combined(first: float, last: float, function: Callable[[float, float], float]) -> float:
    """Apply an affine function to two strengths, numbers or schedules of one form, and return the resulting number or schedule.

    The function is applied to the values of the schedules. Because the function is affine, the
    result holds at each step.
    """
    model = next((each for each in (first, last) if isinstance(each, Schedule)), None)
    if model is None:
        return function(first, last)
    ours, theirs = (each.values if isinstance(each, Schedule) else (each,) * len(model.values) for each in (first, last))
    return model.with_values(tuple(map(function, ours, theirs)))


def _text(value: float) -> str:
    """Return a number in the format ``g`` if this text converts back to the same number, else its ``repr``."""
    return short if float(short := f"{value:g}") == value else repr(value)


def _ramp(kind: str, start: Any, stop: Any, steps: Any, every: Any) -> Schedule:
    ends = _number(kind, "start", start), _number(kind, "stop", stop)
    return Schedule(kind, ends, (_count(kind, "steps", steps),), _count(kind, "every", every))


def _number(kind: str, name: str, value: Any) -> float:
    number = None if isinstance(value, (bool, VaryingStrength)) else number_of(value)
    if number is None:
        example = "piecewise({0: 0.0, 1000: 0.1})" if kind == "piecewise" else f"{kind}(0, 0.5, 1000)"
        hint = f" A strength by depth takes schedules as its ends: by_depth(0, {example})." if isinstance(value, VaryingStrength) else ""
        raise RegularizerError(f"{kind}: {name} is {shown(value)}; it must be a finite number: {example}.{hint}")
    return number


def _count(kind: str, name: str, value: Any) -> int:
    if not _is_whole(value, 1):
        what = "the number of steps" if name == "steps" else "the number of calls that are a step"
        raise RegularizerError(f"{kind}: {name}={shown(value)} is not allowed; {name} is {what}, a whole number of 1 or more.")
    return int(value)


def _is_whole(value: Any, least: int) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and least <= int(value) <= _MOST_STEPS
