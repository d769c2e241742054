"""Converts values to sequences, [time, batch, units], with their lengths, and computes means over steps or pairs of steps that count.

A step counts if it is within the length of its sequence; the other steps are padding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from graphreg.errors import RegularizerError
from graphreg.ir.site import Site
from graphreg.torch_internals.operators import assert_async
from graphreg.torch_internals.other_threads import is_compiling


def mean_over_pairs(values: Tensor, lengths: Tensor | None = None) -> Tensor:
    """Return the mean over all pairs of neighbouring steps that both count; 0 if there is no such pair, for example for a single step.

    This is one mean over the pairs of all sequences, so a long sequence weighs more than a short
    one.

    Args:
        values: [time - 1, batch, ...], one entry for each pair, in the order of
            ``steps.diff(dim=0)``.
        lengths: int64 [batch]; the pair (t, t + 1) counts if t + 1 < length. None if every step
            counts.

    Returns:
        A 0-d tensor.
    """
    if lengths is None:
        return values.mean() if values.numel() else values.sum()
    # ``where`` and no product, because padding may be nan, and 0 * nan is nan
    first = torch.arange(1, values.shape[0] + 1, device=values.device)
    counts = (first[:, None] < lengths).reshape(*values.shape[:2], *[1] * (values.dim() - 2)).expand(values.shape)
    return torch.where(counts, values, 0).sum() / counts.sum().clamp(min=1)


def mean_over_counted(values: Tensor, counted: Tensor | None = None, dim: int | None = None) -> Tensor:
    """Return the mean over the elements that count; 0 if none does.

    Args:
        values: [any shape].
        counted: bool, True at elements that count. Its axes are the first axes of ``values``, each
            of the same size or of size 1. None if all elements count.
        dim: The axis over which to take the mean; None for all axes.

    Returns:
        A tensor of the shape of ``values`` without the axis ``dim``, or a 0-d tensor.
    """
    if counted is None:
        return values.mean() if dim is None else values.mean(dim)
    counts = counted.reshape(*counted.shape, *[1] * (values.dim() - counted.dim())).expand(values.shape)
    kept = torch.where(counts, values, 0)
    if dim is None:
        return kept.sum() / counts.sum().clamp(min=1)
    return kept.sum(dim) / counts.sum(dim).clamp(min=1)


@dataclass(frozen=True)
class Steps:
    """How to read the value of a site, or the values of all calls of a cell, as a sequence.

    Attributes:
        axis: The axis of time in the value, or in the stacked values of ``calls``.
        calls: The sites of a cell's calls, if each call is a step; empty if the value of one site
            is the sequence.
        unbatched: Whether a value without the batch axis is a sequence, too.
        lengths: The name of the model's input that holds the lengths of sequences; None if every
            step counts.
        hint: A sentence to append to the error for a value that is no sequence.
    """

    axis: int = 1
    calls: tuple[Site, ...] = ()
    unbatched: bool = False
    lengths: str | None = None
    hint: str = ""

    def of(self, value: Any, lengths: Any, who: str) -> tuple[Tensor, Tensor | None]:
        """Return the sequence, [time, batch, units], with zeros for steps that do not count, and the lengths, int64 [batch] or None."""
        value = self._stacked(value, who)
        steps = value.unsqueeze(1) if value.dim() == 2 else value.movedim(self.axis, 0).flatten(2)
        if self.lengths is None:
            return steps, None
        lengths, is_mask = self._read(lengths, value, who)
        return _counted(steps, lengths.reshape(steps.shape[1::-1] if is_mask else steps.shape[1:2]))

    def counted(self, value: Any, lengths: Any, who: str) -> tuple[Tensor, Tensor]:
        """Return the value, with the calls of a cell stacked, and a bool tensor that is True at the steps that count.

        The tensor has as many axes as the value; all but the axes of time and of the batch have the
        size 1.
        """
        value = self._stacked(value, who)
        lengths, is_mask = self._read(lengths, value, who)
        time, batch = self.time_and_batch(value.shape)
        if not is_mask:
            lengths = torch.arange(time, device=value.device) < lengths.reshape(batch, 1)
        if value.dim() == 2:
            return value, lengths.reshape(time, 1)
        lengths, axis, sizes = lengths.reshape(batch, time), self.axis % value.dim(), [1] * value.dim()
        # the batch is the first of the other axes
        sizes[axis], sizes[0 if axis else 1] = time, batch
        return value, (lengths if axis else lengths.T).reshape(sizes)

    def _stacked(self, value: Any, who: str) -> Tensor:
        """Return the value of the site, or the stacked values of the calls."""
        for each in value if self.calls else (value,):
            require_tensor(each, who)
        if self.calls:
            self.require_calls([step.shape for step in value], who)
            value = torch.stack(value)
        self.require(value.shape, who)
        stacked: Tensor = value
        return stacked

    def _read(self, lengths: Tensor, value: Tensor, who: str) -> tuple[Tensor, bool]:
        """Return the lengths, int64, or the mask, bool, on the device of the value, and whether it is a mask."""
        self.require_lengths(lengths.shape, lengths.dtype, value.shape, who)
        lengths, what = lengths.to(value.device), f"{who}: lengths='{self.lengths}'"
        if self._is_mask(lengths.shape, lengths.dtype, value.shape):
            return _mask(lengths, what), True
        time, _ = self.time_and_batch(value.shape)
        _require_range(lengths, time, what, lambda longest: self._fits(value.shape, longest))
        return lengths.to(torch.int64), False

    def counts(self, lengths: Tensor, value: Tensor, who: str) -> Tensor:
        """Return, for each sequence in the value, how many of its steps count, int64 [batch]. ``lengths``: these numbers, or a mask."""
        self.require(value.shape, who)
        lengths, is_mask = self._read(lengths, value, who)
        return lengths.sum(-1) if is_mask else lengths

    @staticmethod
    def _is_mask(shape: Sequence[int], dtype: torch.dtype, value: Sequence[int]) -> bool:
        """Whether what has this shape and dtype is a mask of steps, and not lengths, for a value of shape ``value``."""
        # the sequence has no batch axis, so lengths are one number, in a tensor of 0 dims or of 1
        if len(value) == 2:
            return dtype == torch.bool or len(shape) == 2 or (len(shape) == 1 and shape[0] != 1)
        return dtype == torch.bool or len(shape) == 2

    def require(self, shape: Sequence[int], who: str) -> None:
        """Raise RegularizerError if a shape has too few dims or lacks the axis of time.

        With ``calls``, ``shape`` begins with their number.
        """
        least = 2 if self.unbatched else 3
        if len(shape) < least:
            value_shape, what = (shape[1:], "value of each call") if self.calls else (shape, "value")
            form = "[batch, units, ...]" if self.calls else "[batch, time, units]"
            raise RegularizerError(
                f"{who}: the {what} has shape {tuple(value_shape)} and is no sequence: a sequence is {form}, "
                f"{least - bool(self.calls)} dims or more. Neighbouring units are not neighbouring steps.{self.hint}"
            )
        if not -len(shape) <= self.axis < len(shape):
            raise RegularizerError(
                f"{who}: time_axis={self.axis} is out of range for a value of shape {tuple(shape)}; give the axis of time: "
                "1 for [batch, time, ...], 0 for [time, batch, ...]."
            )

    def require_calls(self, shapes: Sequence[Sequence[int]], who: str) -> None:
        """Raise RegularizerError for calls whose values differ in shape."""
        for shape in shapes:  # not a set: symbolic sizes have no hash
            if shape != shapes[0]:
                raise RegularizerError(
                    f"{who}: its calls give values of several shapes, {tuple(shapes[0])} and {tuple(shape)}, and are no steps of one "
                    "sequence. Select the calls one by one, with a function of a site."
                )

    def time_and_batch(self, shape: Sequence[int]) -> tuple[int, int]:
        """Return the number of steps and the number of sequences in a value of this shape."""
        if len(shape) == 2:
            return shape[0], 1
        rest = list(shape)
        return rest.pop(self.axis), rest[0]

    def require_lengths(self, shape: Sequence[int], dtype: torch.dtype, value: Sequence[int], who: str) -> None:
        """Raise RegularizerError for lengths that do not fit a value of shape ``value``.

        With ``calls``, ``value`` begins with their number.
        """
        time, batch = self.time_and_batch(value)
        mask = self._is_mask(shape, dtype, value)
        # neither the sequence nor its lengths have a batch axis
        if len(value) == 2 and len(shape) == mask:
            shape = (1, *shape)
        is_integer = not dtype.is_floating_point and not dtype.is_complex
        if not (mask or is_integer) or tuple(shape) != ((batch, time) if mask else (batch,)):
            fits = self._fits(value, shape[1], exactly=True) if mask and len(shape) == 2 else ""
            raise RegularizerError(
                f"{who}: lengths={self.lengths!r} is {tuple(shape)} {str(dtype).removeprefix('torch.')}; for {batch} sequences of {time} "
                f"steps it must be whole numbers of shape ({batch},), or a mask of shape ({batch}, {time}), True or 1 where a step "
                f"counts.{fits}"
            )

    def _fits(self, shape: Sequence[int], longest: int, exactly: bool = False) -> str:
        """Return a sentence that names other axes with room for ``longest`` steps, as a hint for ``time_axis=``.

        Return ``""`` if there are none, or if a recurrent layer or a cell fixes the axis of time.
        """
        # sizes of a compiled graph may be symbols
        if self.calls or self.unbatched or len(shape) < 3 or is_compiling():
            return ""
        time = self.axis % len(shape)
        batch = next(axis for axis in range(len(shape)) if axis != time)
        fit = [str(i) for i, n in enumerate(shape) if i not in (time, batch) and (n == longest if exactly else n >= longest)]
        return f" The value has shape {tuple(shape)}; if time is another of its axes, give time_axis={' or '.join(fit)}." if fit else ""


def require_tensor(value: Any, who: str) -> None:
    """Raise RegularizerError for a value that is no tensor."""
    if isinstance(value, PackedSequence):
        raise RegularizerError(
            f"{who}: the value is a PackedSequence, no tensor. Select what torch.nn.utils.rnn.pad_packed_sequence gives, and name "
            "the input that carries its lengths: lengths='...'."
        )
    if not isinstance(value, Tensor):
        raise RegularizerError(
            f"{who}: the value is a {type(value).__name__}, no tensor. Select a part of it by its port, as "
            f"'{who.rpartition(' ')[2]}:0', or a value that is computed from it; graphreg.names(model) lists them."
        )


def _counted(steps: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Move the steps that count to the front and set all others to zero; return the steps and the lengths.

    ``mean_over_pairs`` ignores the other steps, but they must be zero: a padded step may be nan
    (attention over nothing), and then backward computes 0 * nan, which is nan.
    """
    time = steps.shape[0]
    if lengths.dtype == torch.bool:
        order = lengths.T.to(torch.int8).argsort(dim=0, descending=True, stable=True)
        steps, lengths = steps.gather(0, order[..., None].expand_as(steps)), lengths.sum(1)
    counts = torch.arange(time, device=steps.device)[:, None] < lengths
    return torch.where(counts[..., None], steps, 0), lengths


def _mask(given: Tensor, what: str) -> Tensor:
    """Return a mask as bool. Check that it has no numbers but 0 and 1: eager code reads them, a compiled graph contains an assertion."""
    if given.dtype == torch.bool:
        return given
    mask = given == 1
    wrong = ~mask & (given != 0)
    if is_compiling():
        assert_async(~wrong.any(), f"{what} must be 0 or 1, if it is a mask of steps")
    elif type(given) is Tensor and given.device.type != "meta" and bool(wrong.any()):
        # not fake tensors, which have no values to read
        raise RegularizerError(
            f"{what} has {given[wrong][0].item():g}; a mask of steps is 1 or True where a step counts, and 0 or False elsewhere. Name the "
            "input that has such a mask, such as 'attention_mask' of a tokenizer."
        )
    return mask


def _require_range(lengths: Tensor, time: int, what: str, fits: Callable[[int], str]) -> None:
    """Check that the lengths are in range: eager code reads their values, a compiled graph contains an assertion."""
    wrong = (lengths < 0) | (lengths > time)
    if is_compiling():
        assert_async(~wrong.any(), f"{what} must be between 0 and the number of steps")
    elif type(lengths) is Tensor and lengths.device.type != "meta" and bool(wrong.any()):
        # not fake tensors, which have no values to read
        raise RegularizerError(
            f"{what} has {int(lengths[wrong][0])} for a sequence of {time} steps; a length is a whole number from 0 to {time}."
            + fits(int(lengths.max()))
        )
