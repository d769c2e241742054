"""The draws of docs/randomness.md, written anew from that page in NumPy: nothing here calls graphreg.

A stream is 64 bits of BLAKE2b, the key of a call is SplitMix64's output function, the word of an element is triple32's.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

_ALL = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_WORD = 0xFFFFFFFF


def stream(seed: int, site: str, kind: str, occurrence: int) -> int:
    """The 64 bits of a stream, without a sign."""
    text = f"graphreg 1|{seed}|{site}|{kind}|{occurrence}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def key(of: int, call: int) -> tuple[int, int]:
    """The two words of a stream's key at a call."""
    x = (of + (call + 1) * _GOLDEN) & _ALL
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _ALL
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _ALL
    x ^= x >> 31
    return x & _WORD, x >> 32


def words(k0: int, k1: int, count: int, lane: int = 0) -> np.ndarray[Any, np.dtype[np.uint32]]:
    """uint32 [count]: the words of the elements, in row-major order."""
    a = np.uint32((k0 + lane * 0x632BE5AB) & _WORD)
    b = np.uint32(k1 ^ ((lane * 0x7F4A7C15) & _WORD))
    i = np.arange(count, dtype=np.uint32)
    with np.errstate(over="ignore"):
        x = i + a
        x = (x ^ (x >> np.uint32(17))) * np.uint32(0xED5AD4BB)
        x = ((x ^ (x >> np.uint32(11))) + b) * np.uint32(0xAC4C1B51)
        x = (x ^ (x >> np.uint32(15))) * np.uint32(0x31848BAB)
        found: np.ndarray[Any, np.dtype[np.uint32]] = (x ^ (x >> np.uint32(14))) + (i ^ b)
    return found


def keep(k: tuple[int, int], like: Tensor, p: float) -> Tensor:
    """0 with probability p, else 1: in the shape and dtype of ``like``."""
    if like.dtype != torch.float64:
        p = float(np.float32(p))  # a rate is float32 where the value is no wider
    drawn = words(*k, like.numel()) >> np.uint32(1) >= int(p * 2.0**31)
    return torch.from_numpy(drawn).view(like.shape).to(like.dtype)


def _fine(k: tuple[int, int], count: int, lane: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    high, low = words(*k, count, lane) >> np.uint32(5), words(*k, count, lane + 1) >> np.uint32(6)
    fine: np.ndarray[Any, np.dtype[np.float64]] = (high.astype(np.float64) * 2.0**26 + low.astype(np.float64)) * 2.0**-53
    return fine


def normal(k: tuple[int, int], like: Tensor) -> Tensor:
    """Standard normal, in the shape and dtype of ``like``: Box & Muller's cosine branch, by torch's logarithm and cosine."""
    count = like.numel()
    if like.dtype == torch.float64:
        radius, angle = torch.from_numpy(_fine(k, count, 0) + 2.0**-54), torch.from_numpy(_fine(k, count, 2))
    else:
        radius = torch.from_numpy(((words(*k, count) >> np.uint32(1)).astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-31))
        angle = torch.from_numpy((words(*k, count, 1) >> np.uint32(8)).astype(np.float32) * np.float32(2.0**-24))
    drawn = (radius.log() * -2).sqrt() * (angle * (2 * math.pi)).cos()
    return drawn.view(like.shape).to(like.dtype)


def uniform(k: tuple[int, int], like: Tensor) -> Tensor:
    """In [0, 1), in the shape and dtype of ``like``."""
    count = like.numel()
    if like.dtype == torch.float64:
        drawn = torch.from_numpy(_fine(k, count, 0))
    else:
        drawn = torch.from_numpy((words(*k, count) >> np.uint32(8)).astype(np.float32) * np.float32(2.0**-24))
    return drawn.view(like.shape).to(like.dtype)
