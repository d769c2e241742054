"""The matrix's oracle: draws in Python's and wide integers, values and derivatives by the chain rule in float64. Nothing of graphreg's."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Arrange = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Draws:
    """The draws of one call from a stream: SplitMix64 for the key, triple32 fed forward for the element."""

    stream: int
    call: int

    def _words(self, count: int, lane: int) -> Tensor:
        """int64 [count], below 2**32."""
        x = (self.stream + (self.call + 1) * 0x9E3779B97F4A7C15) % 2**64
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % 2**64
        x ^= x >> 31
        k0, k1 = (x + lane * 0x632BE5AB) % 2**32, (x >> 32) ^ (lane * 0x7F4A7C15 % 2**32)
        mask, counter = 0xFFFFFFFF, torch.arange(count)
        y = (counter + k0) & mask
        y = ((y ^ (y >> 17)) * 0xED5AD4BB) & mask  # a product of two words may wrap in int64; its low 32 bits are right
        y = (((y ^ (y >> 11)) + k1) * 0xAC4C1B51) & mask
        y = ((y ^ (y >> 15)) * 0x31848BAB) & mask
        return ((y ^ (y >> 14)) + (counter ^ k1)) & mask

    def keep(self, z: Tensor, p: float) -> Tensor:
        """float64 0 or 1, of z's shape: 0 where the 31-bit draw is below p * 2**31, p as it is in the arithmetic of z's dtype."""
        wide = torch.float64 if z.dtype == torch.float64 else torch.float32
        threshold = int(torch.tensor(p, dtype=wide).item() * 2**31)
        return (self._words(z.numel(), 0) >> 1 >= threshold).double().view(z.shape)

    def normal(self, z: Tensor) -> Tensor:
        """Box & Muller. The radius of a narrow normal is rounded to float32 first: near 1 its logarithm feels that."""
        if z.dtype == torch.float64:
            radius, angle = self._fine(z.numel(), 0) + 2.0**-54, self._fine(z.numel(), 2)
        else:
            radius = (((self._words(z.numel(), 0) >> 1).float() + 0.5) / 2**31).double()
            angle = (self._words(z.numel(), 1) >> 8).double() / 2**24
        return (torch.sqrt(-2 * torch.log(radius)) * torch.cos(2 * math.pi * angle)).view(z.shape)

    def _fine(self, count: int, lane: int) -> Tensor:
        high, low = self._words(count, lane) >> 5, self._words(count, lane + 1) >> 6
        return (high.double() * 2**26 + low.double()) / 2**53


@dataclass(frozen=True)
class Hand:
    """One branch by hand, float64: the value, what the splice multiplies by, and the gradients for the cotangent ``c``."""

    output: Tensor
    factor: Tensor
    of_x: Tensor
    of_v: Tensor
    of_w: Tensor
    terms: Tensor  # the sum of the absolute values that the gradient of w is a sum of: the scale of its rounding


def by_hand(x: Tensor, w: Tensor, v: Tensor, c: Tensor, arrange: Arrange, sigmoid: bool, factor: Tensor, added: Tensor) -> Hand:
    """``leaky(act(arrange(x * w)) * factor + added) * v``, leaky with slope 1/2, act the sigmoid or nothing; x, w, v, c: float64."""
    z = arrange(x * w)
    s = 1 / (1 + torch.exp(-z)) if sigmoid else z
    d = s * factor + added
    slope = torch.where(d > 0, 1.0, 0.5)
    back = c * v * slope * factor * (s * (1 - s) if sigmoid else 1.0)
    # where each element of z comes from, as positions in x: the transpose of any arrangement
    origin = arrange(torch.arange(x.numel()).view(x.shape))
    of_y = torch.zeros(x.numel(), dtype=torch.float64).index_put((origin.reshape(-1),), back.reshape(-1)).view(x.shape)
    along = tuple(range(x.dim() - 1))
    return Hand(d * slope * v, factor, of_y * w, c * d * slope, (of_y * x).sum(along), (of_y * x).abs().sum(along))
