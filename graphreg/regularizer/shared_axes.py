"""Reads the option ``share_axes=``: the axes of a value along which a splice has one draw for all elements."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from graphreg.errors import RegularizerError, shown
from graphreg.ir.time_steps import Steps


def share_axes(splice: Any) -> tuple[str | int, ...]:
    """Return the option ``share_axes`` of a splice as a tuple.

    Raises:
        RegularizerError: An entry is neither ``"time"`` nor ``"batch"`` nor a whole number, or, on
            parameters, is not a number.
    """
    given = splice.share_axes
    # A string is a Sequence, too, and would be split into letters.
    axes = (given,) if isinstance(given, (str, int)) else tuple(given) if isinstance(given, Sequence) else None
    if axes is None or any(axis not in ("time", "batch") if isinstance(axis, str) else type(axis) is not int for axis in axes):
        raise RegularizerError(
            f"{type(splice).__name__}: share_axes={shown(given)} is not allowed; give 'time', 'batch', the number of an axis, or "
            "several of these in a tuple: share_axes=('time', 'batch'). One draw then serves all elements along these axes."
        )
    if splice.on == "parameters" and any(isinstance(axis, str) for axis in axes):
        raise RegularizerError(
            f"{type(splice).__name__}: share_axes={shown(given)} is not allowed on parameters, which have no axis of time or of a batch; "
            "give the numbers of axes."
        )
    return axes


def shared_axes(axes: Sequence[str | int], steps: Steps | None, shape: Sequence[int], who: str) -> tuple[int, ...]:
    """Return the numbers of the shared axes, in order.

    Args:
        axes: The option ``share_axes`` of the splice.
        steps: How the value is read as a sequence; needed only if ``axes`` has a name in it.
        shape: The shape of the value.
        who: The splice and its site, for messages.

    Raises:
        RegularizerError: The value lacks one of the axes, or two entries mean the same axis.
    """
    numbers = []
    for axis in axes:
        number = axis if isinstance(axis, int) else _time(steps, shape, who) if axis == "time" else _batch(steps, shape, who)
        if not -len(shape) <= number < len(shape):
            raise RegularizerError(
                f"{who}: share_axes={axis!r} is out of range for a value of shape {tuple(shape)}; an axis of it is a number from "
                f"{-len(shape)} to {len(shape) - 1}. Choose one, or leave the site out."
            )
        numbers.append(number % len(shape))
    if len(set(numbers)) < len(numbers):
        raise RegularizerError(
            f"{who}: share_axes={tuple(axes)!r} names axis {max(numbers, key=numbers.count)} of a value of shape {tuple(shape)} twice. "
            "Name each axis once."
        )
    return tuple(sorted(numbers))


def _time(steps: Steps | None, shape: Sequence[int], who: str) -> int:
    assert steps is not None  # the plan sets steps if the option has a name in it
    steps.require(shape, who)
    # A recurrent layer that is called without a batch returns [time, units].
    return 0 if len(shape) == 2 else steps.axis


def _batch(steps: Steps | None, shape: Sequence[int], who: str) -> int:
    assert steps is not None
    if steps.unbatched and len(shape) < 3:
        raise RegularizerError(
            f"{who}: share_axes='batch', and a value of shape {tuple(shape)} from a recurrent layer has no batch axis. Give the layer a "
            "batch, [batch, time, units], or leave the name out."
        )
    # In [time, batch, ...] the batch comes second; everywhere else it is axis 0.
    return 1 if len(shape) > 2 and steps.axis % len(shape) == 0 else 0
