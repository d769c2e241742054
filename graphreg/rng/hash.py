"""The integer arithmetic of a draw: it computes the key of a call from a stream, and 32 random bits from a key and an element's index.

``call_words``, ``mix`` and ``kept_words`` are written with Python's operators, so that they run on tensors and on Inductor's values
alike (see ``inductor_lowerings.py``). A stream is the 64-bit number of one splice (``noise.stream``). The key of a call is computed by the
output function of SplitMix64. The bits of an element are computed by ``triple32`` (C. Wellons, hash-prospector, 2018), a 32-bit mixer of
bias 0.02. The low word of the key is added before the first round, the high word within the second. At the end, the element's index (xor
the key's high word) is added to the result (Davies-Meyer). Otherwise the map from index to bits would be a bijection and never repeat a
value, but random draws repeat some values.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor

from graphreg.torch_internals.functorch import innermost_transform
from graphreg.torch_internals.other_threads import is_compiling
from graphreg.torch_internals.torch_modes import jit_trace, operator_modes

_LANE = 0x632BE5AB  # the number of a lane times this is added to the key's low word, see ``lane_keys``


def signed(word: int, bits: int = 32) -> int:
    """Reinterpret the low ``bits`` bits of an integer as the signed integer that torch computes with."""
    word &= (1 << bits) - 1
    return word - (1 << bits) if word >> (bits - 1) else word


GOLDEN = 0x9E3779B97F4A7C15
_ALL = (1 << 64) - 1
_M1, _M2, _M3 = (signed(m) for m in (0xED5AD4BB, 0xAC4C1B51, 0x31848BAB))  # the multipliers of triple32
_GOLDEN, _S1, _S2 = (signed(m, 64) for m in (GOLDEN, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))  # the multipliers of SplitMix64


def shift(x: Any, by: int, width: int = 32) -> Any:
    """Shift right and fill with zeros; torch's own shift copies the sign bit."""
    return (x >> by) & ((1 << (width - by)) - 1)


def call_words(streams: Any, call: Any) -> tuple[Any, Any]:
    """Compute the keys of one call: int64 streams and call number -> the low and the high word of each key, as int64."""
    x = streams + (call + 1) * _GOLDEN
    x = (x ^ shift(x, 30, 64)) * _S1
    x = (x ^ shift(x, 27, 64)) * _S2
    x = x ^ shift(x, 31, 64)
    # The shifts copy the sign, so that both words fit into int32.
    return (x << 32) >> 32, x >> 32


def split_mix(stream: int, call: int) -> int:
    """Compute one key in Python's integers: ``call_words`` as one unsigned 64-bit number."""
    # Python's integers do not overflow: ``& _ALL`` drops what int64 arithmetic would drop.
    x = (stream + (call + 1) * GOLDEN) & _ALL
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & _ALL
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & _ALL
    return x ^ (x >> 31)


def lane_keys(k0: Any, k1: Any, lane: int) -> tuple[Any, Any]:
    """Derive the key of a lane. One key gives several lanes of words, because a draw may need more than 32 bits per element."""
    if not lane:
        return k0, k1
    add, flip = lane_words(lane)
    return k0 + add, k1 ^ flip


def lane_words(lane: int) -> tuple[int, int]:
    """Return what is added to the low word of a key for a lane, and what its high word is xor-ed with."""
    return signed(lane * _LANE), signed(lane * GOLDEN)


def mix(counter: Any, k0: Any, k1: Any) -> Any:
    """Hash counters (element indices) with a key: one random 32-bit word each."""
    x = counter + k0
    x = (x ^ shift(x, 17)) * _M1
    x = ((x ^ shift(x, 11)) + k1) * _M2
    x = (x ^ shift(x, 15)) * _M3
    return (x ^ shift(x, 14)) + (counter ^ k1)


def kept_words(words: Any, p: Any) -> Any:
    """Turn random words into a mask: 1 with probability 1 - p, else 0. The mask is computed from a sign bit, because that vectorizes."""
    return ((shift(words, 1) - (p * 2.0**31).to(torch.int32)) >> 31) + 1


def in_plain_eager() -> bool:
    """Return whether no compiler, tracer, transform or dispatch mode is active."""
    return (
        not is_compiling()  # first, because Dynamo cannot trace the other checks
        and not operator_modes()
        and innermost_transform() is None
        and jit_trace() is None
    )


def readable(tensor: Tensor) -> bool:
    """Return whether a tensor's values can be read now: it is on a CPU, and no compiler, tracer, transform or dispatch mode is active."""
    return in_plain_eager() and tensor.device.type == "cpu" and type(tensor) is Tensor


def launches(tensor: Tensor) -> bool:
    """Return whether a kernel of our own can read a tensor now: it is on a GPU, and otherwise as for ``readable``."""
    return in_plain_eager() and tensor.device.type == "cuda" and type(tensor) is Tensor


_STEPS = [[by, (1 << (32 - by)) - 1, multiply] for by, multiply in ((17, _M1), (11, _M2), (15, _M3), (14, 0))]


@cache
def _ready() -> list[list[Tensor]]:
    """Return ``_STEPS`` as tensors. torch makes a tensor of each Python number in an operation, which takes longer than mixing 1000 words.

    The tensors are made at the first use, when no dispatch mode is active. graphreg itself may be imported under a mode that makes fake
    tensors.
    """
    return [[torch.tensor(number, dtype=torch.int32, device="cpu") for number in row] for row in _STEPS]


def mixed(counter: Tensor, k0: Tensor, k1: Tensor, k2: Tensor | None = None) -> Tensor:
    """Compute ``mix`` on int32 tensors with one temporary tensor. The keys may be of one draw, or of several: then they are [draws, 1].

    ``k2`` replaces k1 in the last step. If k2 is k1 with another sign bit, the sign bit of every result is flipped, too.
    """
    steps: Any = _ready() if readable(counter) else _STEPS
    x = counter + k0
    t = torch.empty_like(x)
    for (by, low, multiply), add in zip(steps[:3], (None, k1, None), strict=True):
        x ^= torch.bitwise_right_shift(x, by, out=t).bitwise_and_(low)
        if add is not None:
            x += add
        x *= multiply
    by, low, _ = steps[3]
    x ^= torch.bitwise_right_shift(x, by, out=t).bitwise_and_(low)
    x += torch.bitwise_xor(counter, k1 if k2 is None else k2, out=t)
    return x


def index_blocks(count: int, start: int, device: torch.device) -> Iterator[tuple[int, int, Tensor]]:
    """Yield element indices block by block: (low, high, indices of the elements low to high - 1). The next block overwrites the indices.

    ``start``: the index of element 0.

    On a CPU, eager arithmetic in blocks stays in the cache, which makes it 8 times faster at 10**6 elements.
    """
    size = 1 << 16 if device.type == "cpu" else max(count, 1)
    counter = torch.arange(start, start + min(size, count), dtype=torch.int32, device=device)
    for low in range(0, count, size):
        if low:
            counter += size
        high = min(low + size, count)
        yield low, high, counter if high - low == len(counter) else counter[: high - low]


def words(key: Tensor, count: int, lane: int, start: int) -> Tensor:
    """Hash ``count`` indices from ``start`` on, all below 2**31: int32 [2] key -> int32 [count] random words."""
    k0, k1 = lane_keys(key[0], key[1], lane)
    drawn = torch.empty(count, dtype=torch.int32, device=key.device)
    for low, high, counter in index_blocks(count, start, key.device):
        drawn[low:high] = mixed(counter, k0, k1)
    return drawn


def words_at(key: Tensor, index: Tensor, lane: int) -> Tensor:
    """Hash any indices: int32 [2] key, int64 [shape] indices -> int32 [shape] random words.

    Each block of 2**31 indices has its own key, as if the block were another stream.
    """
    k0, k1 = (key[:1], key[1:]) if index.dim() else (key[0], key[1])
    k0, k1 = lane_keys(k0, k1, lane)
    block = (index >> 31).to(torch.int32) * signed(GOLDEN >> 32)
    drawn: Tensor = mix((index & 0x7FFFFFFF).to(torch.int32), k0 + block, k1 ^ block)
    return drawn
