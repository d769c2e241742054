"""The draws as Triton kernels, for eager code on a GPU: one launch instead of some twenty. The arithmetic is that of ``hash.py``.

This file imports Triton. ``kernels.py`` imports this file where a draw needs it, because Triton is
an optional extra.
"""

# No postponed annotations: Triton reads ``tl.constexpr`` from them.
import torch
import triton
import triton.language as tl
from torch import Tensor

from graphreg.rng.hash import lane_words

_BLOCK = 1024
# The kernels are compiled once for all numbers of elements, starts and lanes.
_VARYING = ["count", "start", "add", "flip"]


@triton.jit(do_not_specialize=_VARYING)
def _hashed(at, key, start, add, flip):
    """The words of some indices, as ``hash.mix`` computes them, in uint32: its shifts fill with zeros."""
    counter = (at + start).to(tl.uint32, bitcast=True)
    k0 = (tl.load(key) + add).to(tl.uint32, bitcast=True)
    k1 = (tl.load(key + 1) ^ flip).to(tl.uint32, bitcast=True)
    x = counter + k0
    x = (x ^ (x >> 17)) * 0xED5AD4BB
    x = ((x ^ (x >> 11)) + k1) * 0xAC4C1B51
    x = (x ^ (x >> 15)) * 0x31848BAB
    return (x ^ (x >> 14)) + (counter ^ k1)


@triton.jit(do_not_specialize=_VARYING)
def _words_kernel(drawn, key, count, start, add, flip, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(drawn + at, _hashed(at, key, start, add, flip).to(tl.int32, bitcast=True), mask=at < count)


@triton.jit(do_not_specialize=_VARYING)
def _keep_kernel(mask, key, rate, count, add, flip, BLOCK: tl.constexpr):
    """As ``hash.kept_words``: 1 if the upper 31 bits of the word are at least 2**31 times the rate."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    # Word and limit are below 2**31, so the sign bit of their difference says which is larger.
    word = (_hashed(at, key, 0, add, flip) >> 1).to(tl.int32, bitcast=True)
    limit = (tl.load(rate) * 2147483648.0).to(tl.int32)
    kept = (((word - limit) >> 31) + 1).to(tl.float32)
    tl.store(mask + at, kept.to(mask.dtype.element_ty), mask=at < count)


@triton.jit
def _keys_kernel(keys, streams, call, count, BLOCK: tl.constexpr):
    """As ``hash.call_words``, in uint64."""
    at = tl.arange(0, BLOCK)
    number = (tl.load(call) + 1).to(tl.uint64, bitcast=True)
    x = tl.load(streams + at, mask=at < count, other=0).to(tl.uint64, bitcast=True) + number * 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    x = x ^ (x >> 31)
    tl.store(keys + 2 * at, x.to(tl.uint32).to(tl.int32, bitcast=True), mask=at < count)
    tl.store(keys + 2 * at + 1, (x >> 32).to(tl.uint32).to(tl.int32, bitcast=True), mask=at < count)


def call_keys(streams: Tensor, call: Tensor) -> Tensor:
    """Compute the keys of one call: int64 [n] streams, int64 [1] call number -> int32 [n, 2] keys."""
    keys = torch.empty(len(streams), 2, dtype=torch.int32, device=streams.device)
    if len(streams):
        # A range in Triton has a length that is a power of 2; the mask leaves out the rest.
        _keys_kernel[(1,)](keys, streams.contiguous(), call, len(streams), BLOCK=triton.next_power_of_2(len(streams)))
    return keys


def words(key: Tensor, count: int, lane: int, start: int) -> Tensor:
    """Draw as ``hash.words`` does: int32 [2] key -> int32 [count]."""
    drawn = torch.empty(count, dtype=torch.int32, device=key.device)
    if count:
        _words_kernel[_grid(count)](drawn, key.contiguous(), count, start, *lane_words(lane), BLOCK=_BLOCK)
    return drawn


def keep(key: Tensor, rate: Tensor, shape: torch.Size, lane: int, dtype: torch.dtype) -> Tensor:
    """Draw a mask: int32 [2] key, 0-d rate of float32 or float64 -> [shape], 1 with probability 1 - rate, else 0."""
    mask = torch.empty(shape, dtype=dtype, device=key.device)
    if mask.numel():
        _keep_kernel[_grid(mask.numel())](mask, key.contiguous(), rate, mask.numel(), *lane_words(lane), BLOCK=_BLOCK)
    return mask


def _grid(count: int) -> tuple[int]:
    return (-(-count // _BLOCK),)
