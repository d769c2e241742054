"""``by_depth``: a strength that grows or falls along the depth of a model, given in place of a number."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, overload

from graphreg.errors import RegularizerError, number_of, shown
from graphreg.schedules import Schedule, VaryingStrength, combined, of_plain


class ByDepth(VaryingStrength):
    """A strength that differs by depth: ``first`` in the first block, ``last`` in the last, and evenly spaced between.

    Attributes:
        first: The strength in the first block, a number or a schedule.
        last: The strength in the last block, a number or a schedule.
    """

    first: float
    last: float

    def __new__(cls, first: float, last: float) -> ByDepth:
        self = super().__new__(cls, max(first, last, key=abs))
        self.first, self.last = first, last
        return self

    def __getnewargs__(self) -> Any:
        return self.first, self.last

    def __repr__(self) -> str:
        return f"by_depth({self.first:g}, {self.last:g})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ByDepth) and (self.first, self.last) == (other.first, other.last)

    def __ne__(self, other: object) -> bool:  # replaces float.__ne__, which compares the numbers
        return not self == other

    def __hash__(self) -> int:
        return hash((self.first, self.last))

    def at(self, block: int, blocks: int) -> float:
        """Return the strength in block number ``block``, counted from 0, of a model that has ``blocks`` blocks."""
        # The last block gets ``last`` exactly. If it is the only one, blocks - 1 is 0 below.
        if block == blocks - 1:
            return combined(self.first, self.last, lambda first, last: last)
        return combined(self.first, self.last, lambda first, last: first + (last - first) * block / (blocks - 1))


@dataclass(frozen=True)
class DepthDecay:
    """A factor for an option of an optimizer: 1 in the last block, and in every other block ``decay`` times that of the next.

    It is no float, so a regularizer refuses it as a strength.
    """

    decay: float

    def __repr__(self) -> str:
        return f"by_depth(decay={self.decay:g})"


@overload
def by_depth(first: float, last: float) -> ByDepth: ...
@overload
def by_depth(*, decay: float) -> DepthDecay: ...
def by_depth(first: float | None = None, last: float | None = None, *, decay: float | None = None) -> ByDepth | DepthDecay:
    """Return a strength that differs by depth, for any regularizer whose formula takes one site at a time.

    The blocks in which the regularizer has a site are numbered in the order in which they run. The
    strength is ``first`` in the first of these blocks, ``last`` in the last one, and evenly spaced
    between: ``drop_path=by_depth(0, 0.2)`` gives the rates of timm's ``drop_path_rate=0.2``.

    A block is one of several numbered modules of one class that have submodules, such as
    ``layers.0``; if none is around a site, the innermost module that has submodules and a sibling
    of the same class. A site outside of all blocks counts as a block of its own.

    One or both ends may be schedules, as in ``by_depth(0, schedules.linear(0, 0.2, 1000))``. Then
    the strengths are evenly spaced at each step.

    For an option in ``graphreg.param_groups`` there is also ``by_depth(decay=0.65)``: the option's
    value is multiplied by 1 in the last block, by 0.65 in the one before it, by 0.65² in the next,
    and so on. This is the layer-wise decay of learning rates of Clark et al. (ELECTRA, ICLR 2020)
    and Bao et al. (BEiT, ICLR 2022), timm's ``layer_decay``.

    Args:
        first: The strength in the first block.
        last: The strength in the last block.
        decay: In place of both: the factor from each block to the one before it, in (0, 1].

    Raises:
        RegularizerError: ``first`` or ``last`` is not a finite number, or they are schedules of
            different kinds or steps; ``decay`` is not in (0, 1], or given together with them.
    """
    if decay is not None:
        number = None if isinstance(decay, (bool, VaryingStrength)) else number_of(decay)
        if number is None or not 0 < number <= 1 or (first, last) != (None, None):
            together = " together with first or last" * ((first, last) != (None, None))
            raise RegularizerError(
                f"by_depth: decay={shown(decay)}{together} is not allowed; give one number in (0, 1]: by_depth(decay=0.65)."
            )
        return DepthDecay(number)
    ends = tuple(given if isinstance(given, Schedule) else number_of(given) for given in (first, last))
    for given, number, name in zip((first, last), ends, ("first", "last"), strict=True):
        if number is None or isinstance(given, (bool, ByDepth)):
            raise RegularizerError(f"by_depth: {name}={shown(given)} is not allowed; give two numbers: by_depth(0, 0.2).")
    # Between the ends, schedules are combined value by value, so both need the same steps.
    forms = {end.form for end in ends if isinstance(end, Schedule)}
    if len(forms) > 1:
        raise RegularizerError(
            f"by_depth: {first!r} and {last!r} are not allowed together; give two schedules of one kind, with the same steps, or one "
            "schedule and a number."
        )
    return ByDepth(*ends)  # type: ignore[arg-type]


def read_strength(value: Any) -> Any:
    """Return the strength that plain data stands for: a schedule, ``{"linear": [0, 0.5, 1000]}``, or ``{"by_depth": [0, 0.2]}``.

    ``{"by_depth": {"decay": 0.65}}`` stands for ``by_depth(decay=0.65)``.

    Any other value is returned unchanged: a number, and also a dict of selectors such as
    ``{"linear": 0.1}``, whose values are no lists.

    Raises:
        RegularizerError: The data has the form of a strength, but something in it is not allowed.
    """
    if (schedule := of_plain(value)) is not None:
        return schedule
    ends = value["by_depth"] if isinstance(value, Mapping) and value.keys() == {"by_depth"} else None
    if isinstance(ends, Mapping) and ends.keys() == {"decay"}:
        return by_depth(decay=ends["decay"])
    if not isinstance(ends, (list, tuple)):
        return value
    if len(ends) != 2:
        raise RegularizerError(f"by_depth={shown(ends)} is not allowed; give a list of two numbers, such as [0, 0.2].")
    return by_depth(*map(read_strength, ends))


def has_schedule(weight: float) -> bool:
    """Return whether a strength changes while the model trains: it is a schedule, or differs by depth with a schedule at an end."""
    ends = (weight.first, weight.last) if isinstance(weight, ByDepth) else (weight,)
    return any(isinstance(end, Schedule) for end in ends)


def own_strength(weight: float) -> float:
    """Return the strength that belongs to no particular site: the weight itself; for ``by_depth``, the end that is further from 0."""
    return max((weight.first, weight.last), key=abs) if isinstance(weight, ByDepth) else weight


def extremes(weight: float) -> list[float]:
    """Return numbers that bound a strength at all times and sites: all values of its schedules, and both ends of ``by_depth``."""
    ends = (weight.first, weight.last) if isinstance(weight, ByDepth) else (weight,)
    return list(dict.fromkeys(value for end in ends for value in (end.values if isinstance(end, Schedule) else (float(end),))))
