"""Counter-based random streams in integer tensor arithmetic (Salmon et al., SC 2011).

A draw is a function of a 64-bit key and the index of the element, so that eager, compiled, forward and backward
all see the same one. Three levels, each frozen by known answers in the tests:

- a *stream* (seed, site name, class, occurrence) is 64 bits of BLAKE2b;
- the key of a *call* is SplitMix64's output function (Steele, Lea & Flood, OOPSLA 2014) of the stream plus
  (call + 1) times its golden-ratio increment: one small tensor a call, for all streams;
- the bits of an *element* are ``triple32`` (C. Wellons, hash-prospector, 2018), a 32-bit mixer of bias 0.02, with the
  key added before the first and the second round, and the counter fed forward (Davies-Meyer), so that the map from
  index to bits is no bijection: a bijection never repeats a value, which random draws do.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

_LANE = 0x632BE5AB  # the increment between the lanes of one element, for draws of more than 32 bits


def _signed(word: int, bits: int) -> int:
    word &= (1 << bits) - 1
    return word - (1 << bits) if word >> (bits - 1) else word


# triple32's multipliers and SplitMix64's, as the signed integers that torch computes with
_M1, _M2, _M3 = (_signed(m, 32) for m in (0xED5AD4BB, 0xAC4C1B51, 0x31848BAB))
_GOLDEN, _S1, _S2 = (_signed(m, 64) for m in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def stream(seed: int, site: str, kind: str, occurrence: int) -> int:
    """The 64-bit identity of the draws of one splice, as a signed integer."""
    text = f"graphreg 1|{seed}|{site}|{kind}|{occurrence}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little", signed=True)


def call_keys(streams: Tensor, call: Tensor) -> Tensor:
    """int64 [n] streams, int64 [1] call -> int32 [n, 2] keys of that call."""
    x = streams + (call + 1) * _GOLDEN
    x = (x ^ _shift(x, 30, 64)) * _S1
    x = (x ^ _shift(x, 27, 64)) * _S2
    x = x ^ _shift(x, 31, 64)
    return torch.stack(((x << 32) >> 32, x >> 32), dim=-1).to(torch.int32)


def ranked(keys: Tensor, rank: int) -> Tensor:
    """The keys of one process of several. The rank is read at each call: a buffer would be broadcast from rank 0."""
    if rank == 0:
        return keys
    words = [[_signed(stream(rank, "", "rank", 0) >> shift, 32) for shift in (0, 32)]]
    return keys + torch.tensor(words, dtype=torch.int32, device=keys.device)


def bits(key: Tensor, shape: torch.Size | tuple[int, ...], lane: int = 0, start: int = 0) -> Tensor:
    """int32 [2] key -> int32 [shape], uniform over all 2**32 words, counted in row-major order from ``start``."""
    count = torch.Size(shape).numel()
    k0, k1 = _lane_keys(key, lane)
    if start + count > 1 << 31:
        return _bits_past(count, k0, k1, start).view(shape)
    if torch.compiler.is_compiling():  # one expression, for Inductor to fuse
        counter = torch.arange(start, start + count, dtype=torch.int32, device=key.device)
        return _mix(counter.view(shape), k0, k1)
    words = torch.empty(count, dtype=torch.int32, device=key.device)
    for low, high in _blocks(count, key.device):
        words[low:high] = _mixed_block(start + low, start + high, k0, k1)
    return words.view(shape)


def _lane_keys(key: Tensor, lane: int) -> tuple[Tensor, Tensor]:
    k0, k1 = key[0], key[1]
    return (k0 + _signed(lane * _LANE, 32), k1 ^ _signed(lane * _GOLDEN, 32)) if lane else (k0, k1)


def _bits_past(count: int, k0: Tensor, k1: Tensor, start: int) -> Tensor:
    """Past 2**31 elements the block of 2**31 that an index lies in joins the key: its draws are another stream's."""
    index = torch.arange(start, start + count, dtype=torch.int64, device=k0.device)
    block = (index >> 31).to(torch.int32) * _signed(0x9E3779B1, 32)
    return _mix((index & 0x7FFFFFFF).to(torch.int32), k0 + block, k1 ^ block)


def _blocks(count: int, device: torch.device) -> Iterator[tuple[int, int]]:
    """Eager arithmetic goes block by block on a CPU, so that its thirteen passes stay in the cache: 8 times faster at 10**6."""
    size = 1 << 16 if device.type == "cpu" else max(count, 1)
    return ((low, min(low + size, count)) for low in range(0, count, size))


def _mixed_block(low: int, high: int, k0: Tensor, k1: Tensor) -> Tensor:
    """``_mix`` of a range of counters, in place."""
    counter = torch.arange(low, high, dtype=torch.int32, device=k0.device)
    x, t = counter + k0, torch.empty_like(counter)
    for by, add, multiply in ((17, None, _M1), (11, k1, _M2), (15, None, _M3)):
        x ^= torch.bitwise_right_shift(x, by, out=t).bitwise_and_((1 << (32 - by)) - 1)
        if add is not None:
            x += add
        x *= multiply
    x ^= torch.bitwise_right_shift(x, 14, out=t).bitwise_and_((1 << 18) - 1)
    counter ^= k1
    return x.add_(counter)


def _mix(counter: Tensor, k0: Tensor, k1: Tensor) -> Tensor:
    x = counter + k0
    x = (x ^ _shift(x, 17)) * _M1
    x = ((x ^ _shift(x, 11)) + k1) * _M2
    x = (x ^ _shift(x, 15)) * _M3
    return (x ^ _shift(x, 14)) + (counter ^ k1)


def _shift(x: Tensor, by: int, width: int = 32) -> Tensor:
    """A logical shift to the right; torch's copies the sign."""
    return (x >> by) & ((1 << (width - by)) - 1)


@dataclass(frozen=True)
class Noise:
    """The draws of one splice at one call. Every method is a function of the key and the element index alone."""

    key: Tensor

    def keep(self, z: Tensor, p: Tensor | float) -> Tensor:
        """1 with probability 1 - p, else 0: [shape of z], to multiply by. ``p`` in [0, 1), exact to 2**-31.

        Its dtype is what is cheapest: z's own in eager, where torch multiplies unlike dtypes slowly; int8 compiled, a
        quarter to save for backward (a bool one Inductor stores slowly).
        """
        threshold = (torch.as_tensor(p, device=z.device) * 2.0**31).to(torch.int32)
        if torch.compiler.is_compiling() or z.numel() > 1 << 31:
            # 0 or -1 from the sign of the difference: arithmetic that vectorizes, where a comparison does not
            return (1 + ((_shift(bits(self.key, z.shape), 1) - threshold) >> 31)).to(torch.int8)
        mask, (k0, k1) = torch.empty(z.numel(), dtype=z.dtype, device=z.device), _lane_keys(self.key, 0)
        for low, high in _blocks(z.numel(), z.device):
            draws = _mixed_block(low, high, k0, k1).bitwise_right_shift_(1).bitwise_and_(0x7FFFFFFF)
            torch.ge(draws, threshold, out=mask[low:high])
        return mask.view(z.shape)

    def uniform(self, z: Tensor) -> Tensor:
        """Uniform in [0, 1): [shape of z], z's dtype but float32 for half precision; 24 bits, float64: 53."""
        if z.dtype == torch.float64:
            return self._fine(z, 0)
        return _shift(bits(self.key, z.shape), 8).to(torch.float32) * 2.0**-24

    def normal(self, z: Tensor) -> Tensor:
        """Standard normal: [shape of z], z's dtype. Box & Muller (1958), the cosine branch; |value| < 6.7."""
        if z.dtype == torch.float64:
            radius, angle = self._fine(z, 0) + 2.0**-54, self._fine(z, 2)
        else:
            radius = (_shift(bits(self.key, z.shape), 1).to(torch.float32) + 0.5) * 2.0**-31
            angle = _shift(bits(self.key, z.shape, 1), 8).to(torch.float32) * 2.0**-24
        return (torch.sqrt(-2 * torch.log(radius)) * torch.cos(2 * torch.pi * angle)).to(z.dtype)

    def _fine(self, z: Tensor, lane: int) -> Tensor:
        high = _shift(bits(self.key, z.shape, lane), 5).to(torch.float64)
        low = _shift(bits(self.key, z.shape, lane + 1), 6).to(torch.float64)
        return (high * 2.0**26 + low) * 2.0**-53
