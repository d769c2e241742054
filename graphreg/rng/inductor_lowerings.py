"""The functions with which Inductor lowers the operators of ``operators.py`` to loops, so that it can fuse the draws."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from graphreg.rng.hash import call_words, kept_words, lane_keys, mix
from graphreg.torch_internals.dynamo_marks import assume_constant_result
from graphreg.torch_internals.inductor import pointwise, register_lowerings, strides_of


@assume_constant_result
def lowers() -> bool:
    """Register the lowerings, and return whether that was possible.

    This function runs when a graph is traced, not at import, because importing Inductor takes a
    second. It returns False if the Inductor of this torch lacks a name that graphreg uses; the
    draws are then traced as ordinary operators.
    """
    ours = torch.ops.graphreg
    return register_lowerings({ours.bits.default: _lower_bits, ours.keep.default: _lower_keep, ours.next_keys.default: _lower_keys})


def _lower_bits(key: Any, shape: Sequence[Any], lane: int, start: int) -> Any:
    load = key.make_loader()
    return pointwise(key, torch.int32, shape, lambda ops, index: _mixed(ops, load, index, shape, lane, start).value)


def _lower_keep(key: Any, p: Any, shape: Sequence[Any], lane: int) -> Any:
    load, rate = key.make_loader(), p.make_loader()

    def keep(ops: Any, index: Sequence[Any]) -> Any:
        kept = kept_words(_mixed(ops, load, index, shape, lane, 0), _Word(ops, rate(()), p.get_dtype()))
        return ops.to_dtype(kept.value, torch.int8)

    return pointwise(key, torch.int8, shape, keep)


def _lower_keys(streams: Any, step: Any, free: Any, keys: Any) -> Any:
    stream, call, is_free, frozen = (each.make_loader() for each in (streams, step, free, keys))

    def key(ops: Any, index: Sequence[Any]) -> Any:
        row, column = index
        low, high = call_words(_Word(ops, stream((row,)), torch.int64), _Word(ops, call((0,)), torch.int64))
        # Column 0 of the keys has the low words, column 1 the high words.
        word = ops.where(ops.eq(ops.index_expr(column, torch.int64), ops.constant(0, torch.int64)), low.value, high.value)
        free = ops.ne(is_free((0,)), ops.constant(0, torch.int64))
        return ops.where(free, ops.to_dtype(word, torch.int32), frozen(index))

    return pointwise(keys, torch.int32, keys.get_size(), key)


def _mixed(ops: Any, load: Any, index: Sequence[Any], shape: Sequence[Any], lane: int, start: int) -> _Word:
    # A loop of Inductor's knows the position on each axis; a draw needs the row-major index.
    at = sum((i * stride for i, stride in zip(index, strides_of(shape), strict=True)), start)
    k0, k1 = lane_keys(_Word(ops, load((0,))), _Word(ops, load((1,))), lane)
    word: _Word = mix(_Word(ops, ops.index_expr(at, torch.int32)), k0, k1)
    return word


class _Word:
    """A value in Inductor with the operators that ``hash.py`` uses. Inductor's own class has no ``>>``, and gives numbers no dtype."""

    def __init__(self, ops: Any, value: Any, dtype: torch.dtype = torch.int32) -> None:
        self.ops, self.value, self.dtype = ops, value, dtype

    def _with(self, name: str, other: _Word | float) -> _Word:
        value = other.value if isinstance(other, _Word) else self.ops.constant(other, self.dtype)
        return _Word(self.ops, getattr(self.ops, name)(self.value, value), self.dtype)

    def to(self, dtype: torch.dtype) -> _Word:
        return _Word(self.ops, self.ops.to_dtype(self.value, dtype), dtype)

    def __add__(self, other: _Word | int) -> _Word:
        return self._with("add", other)

    def __sub__(self, other: _Word | int) -> _Word:
        return self._with("sub", other)

    def __mul__(self, other: _Word | float) -> _Word:
        return self._with("mul", other)

    def __xor__(self, other: _Word | int) -> _Word:
        return self._with("bitwise_xor", other)

    def __and__(self, other: _Word | int) -> _Word:
        return self._with("bitwise_and", other)

    def __rshift__(self, other: _Word | int) -> _Word:
        return self._with("bitwise_right_shift", other)

    def __lshift__(self, other: _Word | int) -> _Word:
        return self._with("bitwise_left_shift", other)
