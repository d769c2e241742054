"""The draws as operators of a compiled graph, which Inductor lowers to the arithmetic of ``hash.py``.

Written out, a draw is twenty to thirty operators. Dynamo, autograd and the partitioner carry every one of them, and Inductor traces
a whole expression again whenever it grows by one (``inner_fn_opcount``, called by ``has_exceeded_max_reads``): for the masks of four
sites that was a quarter of the time to compile. Any other backend runs the operators as they stand here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from graphreg.rng.hash import call_words, kept_words, lane_keys, mix, words
from graphreg.torch_internals import Changes, lower, pointwise, strides_of, transforms

LIMIT = 1 << 31  # elements; past it an index needs more than 32 bits, and the draws are written out


@torch.library.custom_op("graphreg::bits", mutates_args=())
def fused_bits(key: Tensor, shape: Sequence[int], lane: int, start: int) -> Tensor:
    """Draw random words as one operator: int32 [2] key -> int32 [shape] (``hash.words``)."""
    return words(key, torch.Size(shape).numel(), lane, start).view(tuple(shape))


@torch.library.custom_op("graphreg::keep", mutates_args=())
def fused_keep(key: Tensor, p: Tensor, shape: Sequence[int], lane: int) -> Tensor:
    """Draw a mask as one operator: int32 [2] key, 0-d rate p -> int8 [shape], 1 with probability 1 - p, else 0."""
    kept: Tensor = kept_words(words(key, torch.Size(shape).numel(), lane, 0), p)
    return kept.to(torch.int8).view(tuple(shape))


@torch.library.custom_op("graphreg::next_keys", mutates_args=())
def fused_keys(streams: Tensor, step: Tensor, free: Tensor, keys: Tensor) -> Tensor:
    """Compute the keys of call ``step`` as one operator: int32 [n, 2]; where ``free`` is 0, a copy of the held ``keys``."""
    low, high = call_words(streams, step)
    return torch.where(free != 0, torch.stack((low, high), dim=-1).to(torch.int32), keys)


@fused_bits.register_fake
def _(key: Tensor, shape: Sequence[int], lane: int, start: int) -> Tensor:
    return key.new_empty(tuple(shape))


@fused_keep.register_fake
def _(key: Tensor, p: Tensor, shape: Sequence[int], lane: int) -> Tensor:
    return key.new_empty(tuple(shape), dtype=torch.int8)


@fused_keys.register_fake
def _(streams: Tensor, step: Tensor, free: Tensor, keys: Tensor) -> Tensor:
    return torch.empty_like(keys)


class _Within:
    """Whether a compiler below Dynamo is tracing, which ``torch.compiler.is_compiling`` does not tell."""

    on = False


@contextmanager
def within_backend() -> Iterator[None]:
    """Let draws take their compiled form while the inner compiler of graphreg's backend traces."""
    with Changes() as changes, changes:
        changes.put(_Within, "on", True)
        yield


def compiling() -> bool:
    """Whether a compiler is tracing: Dynamo, or the inner compiler of graphreg's backend."""
    return torch.compiler.is_compiling() or _Within.on


def recomputes() -> bool:
    """Whether a compiler is tracing that recomputes marked nodes in backward: Dynamo's, or that of graphreg's backend.

    False under torch.func.grad, which does not take checkpoints.
    """
    return (torch.compiler.is_dynamo_compiling() or _Within.on) and not transforms()


def fuses() -> bool:
    """Whether to trace a draw as one custom operator, for Inductor to lower.

    Not in an exported program, which must hold torch's operators alone, nor under torch.vmap, which can map only those.
    """
    traced = _Within.on or (torch.compiler.is_dynamo_compiling() and not torch.compiler.is_exporting())
    return traced and not transforms() and _lowers()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _lowers() -> bool:
    """Register the lowerings when the first graph is traced, because importing Inductor takes a second.

    False with a torch whose Inductor has other names: there the draws are written out.
    """
    ours = torch.ops.graphreg
    return lower({ours.bits.default: _lower_bits, ours.keep.default: _lower_keep, ours.next_keys.default: _lower_keys})


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
        word = ops.where(ops.eq(ops.index_expr(column, torch.int64), ops.constant(0, torch.int64)), low.value, high.value)
        free = ops.ne(is_free((0,)), ops.constant(0, torch.int64))
        return ops.where(free, ops.to_dtype(word, torch.int32), frozen(index))

    return pointwise(keys, torch.int32, keys.get_size(), key)


def _mixed(ops: Any, load: Any, index: Sequence[Any], shape: Sequence[Any], lane: int, start: int) -> _Word:
    at = sum((i * stride for i, stride in zip(index, strides_of(shape), strict=True)), start)
    k0, k1 = lane_keys(_Word(ops, load((0,))), _Word(ops, load((1,))), lane)
    word: _Word = mix(_Word(ops, ops.index_expr(at, torch.int32)), k0, k1)
    return word


class _Word:
    """A value of Inductor's with Python's operators, as ``hash.py`` needs them; Inductor's own values have fewer, and take no numbers."""

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
