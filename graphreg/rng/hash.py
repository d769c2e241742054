"""The arithmetic of a draw: a word of 32 bits from a key and the index of the element; and that of the keys.

It is written once, in signs: on tensors, and on the values of which Inductor makes code (see ``ops.py``). The key of a call is
SplitMix64's output function; the word of an element is that of
``triple32`` (C. Wellons, hash-prospector, 2018), a 32-bit mixer of bias 0.02, with the key added before the first and the
second round, and the counter fed forward (Davies-Meyer), so that the map from index to bits is no bijection: a bijection
never repeats a value, which random draws do.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor

from graphreg.torch_internals import innermost_transform, jit_trace, operator_modes

_LANE = 0x632BE5AB  # the increment between the lanes of one element, for draws of more than 32 bits


def signed(word: int, bits: int = 32) -> int:
    """As the signed integer that torch computes with."""
    word &= (1 << bits) - 1
    return word - (1 << bits) if word >> (bits - 1) else word


GOLDEN = 0x9E3779B97F4A7C15
_ALL = (1 << 64) - 1
_M1, _M2, _M3 = (signed(m) for m in (0xED5AD4BB, 0xAC4C1B51, 0x31848BAB))  # triple32's
_GOLDEN, _S1, _S2 = (signed(m, 64) for m in (GOLDEN, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))  # SplitMix64's


def shift(x: Any, by: int, width: int = 32) -> Any:
    """A logical shift to the right; torch's copies the sign."""
    return (x >> by) & ((1 << (width - by)) - 1)


def call_words(streams: Any, call: Any) -> tuple[Any, Any]:
    """int64 streams and call -> the low and the high word of their keys, as int64."""
    x = streams + (call + 1) * _GOLDEN
    x = (x ^ shift(x, 30, 64)) * _S1
    x = (x ^ shift(x, 27, 64)) * _S2
    x = x ^ shift(x, 31, 64)
    return (x << 32) >> 32, x >> 32


def split_mix(stream: int, call: int) -> int:
    """Both words of a key, the high one above, in Python's integers."""
    x = (stream + (call + 1) * GOLDEN) & _ALL
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & _ALL
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & _ALL
    return x ^ (x >> 31)


def lane_keys(k0: Any, k1: Any, lane: int) -> tuple[Any, Any]:
    return (k0 + signed(lane * _LANE), k1 ^ signed(lane * GOLDEN)) if lane else (k0, k1)


def mix(counter: Any, k0: Any, k1: Any) -> Any:
    """The words of counters."""
    x = counter + k0
    x = (x ^ shift(x, 17)) * _M1
    x = ((x ^ shift(x, 11)) + k1) * _M2
    x = (x ^ shift(x, 15)) * _M3
    return (x ^ shift(x, 14)) + (counter ^ k1)


def kept_words(found: Any, p: Any) -> Any:
    """Words and the rate -> 1 with probability 1 - p, else 0. The sign of a difference: arithmetic that vectorizes."""
    return ((shift(found, 1) - (p * 2.0**31).to(torch.int32)) >> 31) + 1


def readable(tensor: Tensor) -> bool:
    """Whether a tensor is numbers in memory: on a CPU, and nothing traces, wraps or simulates."""
    return (
        not torch.compiler.is_compiling()  # asked first: Dynamo does not know the other questions
        and tensor.device.type == "cpu"
        and type(tensor) is Tensor
        and not operator_modes()
        and innermost_transform() is None
        and jit_trace() is None
    )


_STEPS = [[by, (1 << (32 - by)) - 1, multiply] for by, multiply in ((17, _M1), (11, _M2), (15, _M3), (14, 0))]


@cache
def _ready() -> list[list[Tensor]]:
    """``_STEPS`` as tensors: of a Python number torch makes one at each operation, which takes longer than to mix a thousand words.

    Made when they are first read, where nothing simulates: an import may happen under a mode that makes fake tensors.
    """
    return [[torch.tensor(number, dtype=torch.int32, device="cpu") for number in row] for row in _STEPS]


def mixed(counter: Tensor, k0: Tensor, k1: Tensor, k2: Tensor | None = None) -> Tensor:
    """``mix`` in as little memory as it takes. ``k2``: k1 in the last line, with a bit flipped where the words' is to be."""
    steps: Any = _ready() if readable(counter) else _STEPS
    x, t = counter + k0, torch.empty_like(counter)
    for (by, low, multiply), add in zip(steps[:3], (None, k1, None), strict=True):
        x ^= torch.bitwise_right_shift(x, by, out=t).bitwise_and_(low)
        if add is not None:
            x += add
        x *= multiply
    by, low, _ = steps[3]
    x ^= torch.bitwise_right_shift(x, by, out=t).bitwise_and_(low)
    x += torch.bitwise_xor(counter, k1 if k2 is None else k2, out=t)
    return x


def blocks(count: int, start: int, device: torch.device) -> Iterator[tuple[int, int, Tensor]]:
    """Ranges, each with its counters, which are written over by the next.

    Eager arithmetic goes block by block on a CPU, so that its passes stay in the cache: 8 times faster at 10**6.
    """
    size = 1 << 16 if device.type == "cpu" else max(count, 1)
    counter = torch.arange(start, start + min(size, count), dtype=torch.int32, device=device)
    for low in range(0, count, size):
        if low:
            counter += size
        high = min(low + size, count)
        yield low, high, counter if high - low == len(counter) else counter[: high - low]


def words(key: Tensor, count: int, lane: int, start: int) -> Tensor:
    """int32 [2] key -> int32 [count]: the words of the counters from ``start``, up to 2**31."""
    k0, k1 = lane_keys(key[0], key[1], lane)
    found = torch.empty(count, dtype=torch.int32, device=key.device)
    for low, high, counter in blocks(count, start, key.device):
        found[low:high] = mixed(counter, k0, k1)
    return found


def words_past(key: Tensor, count: int, lane: int, start: int) -> Tensor:
    """Past 2**31 elements the block of 2**31 that an index lies in joins the key: its draws are another stream's."""
    k0, k1 = lane_keys(key[0], key[1], lane)
    index = torch.arange(start, start + count, dtype=torch.int64, device=key.device)
    block = (index >> 31).to(torch.int32) * signed(GOLDEN >> 32)
    found: Tensor = mix((index & 0x7FFFFFFF).to(torch.int32), k0 + block, k1 ^ block)
    return found
