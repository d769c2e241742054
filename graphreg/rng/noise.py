"""The noise that splices draw: counter-based random streams in integer tensor arithmetic (Salmon et al., SC 2011).

A random number is a function of a 64-bit key and the index of the element, so that eager and compiled code, forward and backward all see
the same numbers. There are three levels, and the tests compare each level with known answers:

    seed, site, class, occurrence --> stream --(number of the call)--> key of the call --(index)--> bits of an element
                                                                          ^
                                       rank and DataLoader worker --------+

- a *stream* is a number of 64 bits, one for each splice: BLAKE2b of (seed, site name, class, occurrence), where the occurrence is the
  position of the splice among those of its class at the site, from 0;
- the key of a *call* is the output function of SplitMix64 (Steele, Lea & Flood, OOPSLA 2014), applied to the stream plus (n + 1) times
  SplitMix64's golden-ratio increment, where n is the number of the call; one small tensor holds the keys of all streams. A rank above 0
  and a DataLoader worker add words of their own to them (``of_process``);
- the bits of an *element* are triple32 of its index and the call's key (``hash.py``).
"""

from __future__ import annotations

import hashlib
import operator
import os
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import get_worker_info

from graphreg.errors import GraphRegError, RandomnessError
from graphreg.rng.ahead import FLIP, SMALL, CallPlace
from graphreg.rng.hash import (
    call_words,
    index_blocks,
    kept_words,
    lane_keys,
    mix,
    mixed,
    readable,
    shift,
    signed,
    split_mix,
    words_at,
)
from graphreg.rng.kernels import drawn_keys, drawn_mask, drawn_words
from graphreg.rng.operators import LIMIT, compiling, fits_int32, fused_bits, fused_keep, fused_keys, fuses
from graphreg.rng.window import Window
from graphreg.torch_internals.autograd import backward_task, in_backward
from graphreg.torch_internals.dynamo_marks import assume_constant_result
from graphreg.torch_internals.functorch import batch_positions, is_differentiated, transforms, vmaps
from graphreg.torch_internals.other_threads import is_compiling


def stream(seed: int, site: str, kind: str, occurrence: int) -> int:
    """Return the 64-bit identity of one splice's draws, as a signed integer: a hash of the seed, site, class and occurrence."""
    text = f"graphreg 1|{seed}|{site}|{kind}|{occurrence}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little", signed=True)


def call_keys(streams: Tensor, call: Tensor) -> Tensor:
    """Compute the keys of one call for all streams: int64 [n] streams, int64 [1] call number -> int32 [n, 2] keys."""
    if len(streams) <= _FEW and call.numel() == 1 and readable(streams) and readable(call):
        words, number = [], call.item()
        for each in streams.tolist():
            word = split_mix(each, int(number))
            words.append((signed(word), signed(word >> 32)))
        return torch.tensor(words, dtype=torch.int32, device="cpu").view(-1, 2)
    if (keys := drawn_keys(streams, call)) is not None:
        return keys
    return torch.stack(call_words(streams, call), dim=-1).to(torch.int32)


def next_keys(streams: Tensor, step: Tensor, free: Tensor, keys: Tensor) -> Tensor:
    """Compute ``call_keys`` in a compiled graph; if ``free`` is 0, as it is within ``frozen_noise``, return ``keys`` unchanged."""
    if fuses():
        fused: Tensor = fused_keys(streams, step, free, keys)
        return fused
    return torch.where(free != 0, call_keys(streams, step), keys)


def of_process(keys: Tensor, alike: bool, position: int | None = None) -> Tensor:
    """Make keys differ between DataLoader workers and, unless all ranks are to draw ``alike``, between ranks.

    If ``position`` is a number, it takes the place of the rank.

    Rank and worker are looked up at each call. If a buffer held them, it would be broadcast from rank 0 and copied to every worker.
    """
    place = 0 if alike else rank() if position is None else position
    keys = keys if place == 0 else ranked(keys, place)
    words = _worker_words(_process.name)
    return keys if words is None else keys + _joined(keys, words)


def rank() -> int:
    """Return the rank of this process in torch.distributed; 0 if it is not initialized."""
    if not dist.is_available():
        return 0
    # Dynamo takes the results of is_initialized and get_rank as constants without a guard, but it guards on the group.
    world = dist.group.WORLD if torch.compiler.is_dynamo_compiling() else None
    if world is not None and dist.is_initialized():  # up to torch 2.10, ``world`` is not None even without a group
        return dist.get_rank(world)
    return dist.get_rank() if dist.is_initialized() else 0


def ranked(keys: Tensor, rank: int) -> Tensor:
    """Return the keys of one rank. The keys of rank 0 are unchanged."""
    return keys if rank == 0 else keys + _joined(keys, _rank_words(rank))


def as_rank(key: Tensor, own: int, other: int) -> Tensor:
    """Turn the key of rank ``own`` into that of rank ``other``: int32 [2] -> int32 [2]."""
    if own == other:
        return key
    plain = key if own == 0 else key - _joined(key, _rank_words(own))[0]
    return ranked(plain[None], other)[0]


def _joined(keys: Tensor, words: tuple[int, int]) -> Tensor:
    return torch.tensor([words], dtype=torch.int32, device=keys.device)


# assume_constant_result makes Dynamo call the function while it traces, because Dynamo cannot trace BLAKE2b.
@assume_constant_result
def _rank_words(rank: int) -> tuple[int, int]:
    word = stream(rank, "", "rank", 0)
    return signed(word), signed(word >> 32)


@assume_constant_result
def _worker_words(process: str) -> tuple[int, int] | None:
    """Return the words that a DataLoader worker adds to its keys; None in any other process.

    Each worker has a copy of the module. So without these words, all workers would draw the same numbers, and do so again in each epoch.
    A worker's seed differs from epoch to epoch. ``process`` is an argument only so that Dynamo guards on it (see ``_Process``).
    """
    info = get_worker_info()
    if info is None:
        return None
    word = stream(info.seed, "", "worker", info.id)
    return signed(word), signed(word >> 32)


class _Process:
    """Holds a name for this process: its process id if it was forked, else ``""``."""

    def __init__(self) -> None:
        self.name = ""


# Dynamo guards on the name, so that a forked worker does not run its parent's compiled code. The name is an attribute of an object, because
# up to torch 2.11 Dynamo takes the attributes of a class as constants.
_process = _Process()


def _forked() -> None:
    _process.name = str(os.getpid())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


def bits(key: Tensor, shape: torch.Size | tuple[int, ...], lane: int = 0, start: int = 0) -> Tensor:
    """Draw random words, uniform over all 2**32 values: int32 [2] key -> int32 [shape], indexed in row-major order from ``start`` on."""
    count = torch.Size(shape).numel()
    if not fits_int32(start + count):
        # Indices of 2**31 or more do not fit into int32, in which ``words`` counts.
        return words_at(key, torch.arange(start, start + count, dtype=torch.int64, device=key.device), lane).view(shape)
    if transforms():  # torch.vmap does not allow the in-place writes of ``words``
        k0, k1 = lane_keys(key[:1], key[1:], lane)
        mapped: Tensor = mix(torch.arange(start, start + count, dtype=torch.int32, device=key.device), k0, k1)
        return mapped.view(shape)
    if not compiling():
        return drawn_words(key, count, lane, start).view(shape)
    drawn: Tensor
    if fuses():
        drawn = fused_bits(key, list(shape), lane, start)
    else:
        k0, k1 = lane_keys(key[0], key[1], lane)
        drawn = mix(torch.arange(start, start + count, dtype=torch.int32, device=key.device).view(shape), k0, k1)
    return drawn


def _limit(rate: float) -> int:
    """Return the number that the word of a kept element reaches. Its sign bit is flipped, as in the words to compare with."""
    word = (int(rate * 2.0**31) * 2 ^ FLIP) & 0xFFFFFFFF
    return word - (1 << 32) if word >> 31 else word


DIFFERENTIATED = (
    "the rate of a random mask (noise.keep) is differentiated, and a mask of zeros and ones has no derivative with respect to its rate."
    " The rest of a formula, such as the factor 1 / (1 - p), has one, but that alone is wrong, often in its sign. To find how a loss "
    "changes with a rate, call the module at two rates that differ visibly (by 0.05, say) with equal masks elsewhere "
    "(graphreg.frozen_noise, or the same graphreg.rng_state), and average the differences over many calls. So do not pass a rate that "
    "requires a gradient. Within a formula, give noise.keep p.detach() if the gradient should leave the mask out. A rate that is "
    "learned needs a mask with a derivative, as concrete_dropout has."
)
_RATES = (torch.float32, torch.float64)  # the dtypes of a rate that is not converted
_FEW = 16  # up to this many streams, Python integers are faster than a dozen operators
_LANES = 4  # lanes of every draw: a float64 normal needs four, and no draw must depend on the dtypes of earlier draws
_is_cuda = operator.attrgetter("is_cuda")  # tests draw on a CPU as on a GPU


@dataclass(eq=False)
class Noise:
    """The random numbers of one splice at one call. A regularizer draws masks, uniform values or normal values from it.

    The draws are numbered from 0. Each element of a draw depends only on the key, the draw's number and the element's index. (Draw number d
    uses the lanes 4d to 4d + 3 of the key, see ``lane_keys``.) To repeat the draws from the first on, take ``noise.repeated()``. Under
    ``torch.vmap``, the option ``randomness`` decides whether all rows share one draw or each row has its own.

    A draw for z has one element for each element of z. Along *shared* axes, all elements of z share one element of the draw: the result has
    length 1 there, and broadcasts against z.

    Attributes:
        key: int32 [2], the key of this call.
        shared: The axes along which every draw is shared, from the splice's ``share_axes=``. A formula may share more axes in a draw.
        window: Where this rank's part lies in the whole value, if several ranks divide one value; else None. The draws for the part are
            those that one process would draw for the same elements of the whole value.
        place: The place of this call among the calls whose draws were made ahead of time; None if there are none.
    """

    key: Tensor
    shared: tuple[int, ...] = ()
    window: Window | None = None
    place: CallPlace | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self._drawn, self._task = 0, None if is_compiling() or compiling() else backward_task()

    def keep(self, z: Tensor, p: Tensor | float, shared: Iterable[int] = ()) -> Tensor:
        """Draw a mask to multiply z by: 1 with probability 1 - p, else 0.

        The mask has the dtype that costs least. In eager code, this is z's dtype, because torch multiplies different dtypes slowly. In
        compiled code it is int8, which takes a quarter of float32's memory when saved for backward (Inductor stores bool slowly).

        Args:
            z: The value that the mask is for. The mask has the shape and the device of z.
            p: The rate, in [0, 1). It is converted to at least float32, and rounded down to a multiple of 2**-31.
            shared: Axes of z along which all elements share one draw.

        Returns:
            [shape of z, 1 along shared axes].

        Raises:
            RandomnessError: A derivative by p is being recorded. The mask has none.
        """
        if isinstance(p, Tensor) and is_differentiated(p):
            raise RandomnessError(DIFFERENTIATED)
        if self.place is not None and not shared and (ahead := self._kept_ahead(z, p, self.place)) is not None:
            return ahead

        if torch.compiler.is_dynamo_compiling() and type(p) is Tensor and p.dtype in _RATES and p.device == z.device and (
            not (shared or self.shared) and self.window is None and fits_int32(z.numel()) and fuses()
        ):  # as below; most draws come here, and Dynamo traces each function that it meets
            lane, self._drawn = self._drawn * _LANES, self._drawn + 1
            at_once: Tensor = fused_keep(self.key, p.detach(), list(z.shape), lane)
            return at_once

        if z.dim() == 0 and transforms():  # draw [1] instead of 0-d: see functorch.batch_positions
            return Noise.keep(self, z[None], p)[0]
        z, index = self._drawn_for(z, shared) if shared or self.shared or self.window is not None else (z, None)
        key, lane = self._next(z)
        rate = torch.as_tensor(p, device=z.device)
        rate = rate.to(torch.promote_types(rate.dtype, torch.float32))  # 2**31 times a half-precision rate is infinite

        if compiling() or z.numel() > LIMIT or transforms() or index is not None:
            if fits_int32(z.numel()) and fuses() and index is None:
                fused: Tensor = fused_keep(key, rate.detach(), list(z.shape), lane)
                return fused
            kept: Tensor = kept_words(_bits(key, z, lane, index), rate)
            return kept.to(torch.int8 if compiling() else z.dtype)
        if _is_cuda(z) and (mask := drawn_mask(key, rate, z, lane)) is not None:
            return mask

        # The mask is word >= 2 * int(2**31 * p), both unsigned. torch compares signed numbers, so the sign bits of both sides are flipped.
        limit = _limit(rate.detach().item()) if readable(rate) else ((rate * 2.0**31).to(torch.int32) * 2) ^ FLIP
        low_word, high_word = key.unbind()
        k0, k1 = lane_keys(low_word, high_word, lane)
        k2 = k1 ^ FLIP
        mask = torch.empty(z.numel(), dtype=z.dtype, device=z.device)
        for low, high, counter in index_blocks(z.numel(), 0, z.device):
            drawn = mixed(counter, k0, k1, k2)
            mask[low:high] = torch.ge(drawn, limit, out=drawn)  # into int32: a bool result would take longer than all steps before it
        return mask.view(z.shape)

    def _kept_ahead(self, z: Tensor, p: Tensor | float, place: CallPlace) -> Tensor | None:
        """Return the mask of ``keep`` from those that were drawn ahead; None if it is not there."""
        if not (isinstance(p, Tensor) and p.dtype in _RATES and readable(z) and p.device.type == "cpu" and 0 < z.numel() <= SMALL):
            return None
        if self._task != backward_task():  # an error, see ``_next``
            return None
        mask = place.drawn.mask(place, (self._drawn * _LANES, z.shape, _limit(p.item())))
        if mask is None:
            return None
        self._drawn += 1
        return mask.to(z.dtype)

    def uniform(self, z: Tensor, shared: Iterable[int] = ()) -> Tensor:
        """Draw uniform values in [0, 1): float64 values with 53 bits for a float64 z, else float32 values with 24 bits.

        Args:
            z: The value whose shape and device the result takes.
            shared: Axes of z along which all elements share one draw.

        Returns:
            [shape of z, 1 along shared axes].
        """
        if z.dim() == 0 and transforms():  # draw [1] instead of 0-d: see functorch.batch_positions
            return Noise.uniform(self, z[None])[0]
        z, index = self._drawn_for(z, shared)
        key, lane = self._next(z)
        if z.dtype == torch.float64:
            return _fine(key, z, lane, index)
        drawn: Tensor = shift(_bits(key, z, lane, index), 8)
        return drawn.to(torch.float32) * 2.0**-24

    def normal(self, z: Tensor, shared: Iterable[int] = ()) -> Tensor:
        """Draw standard normal values in z's dtype, by the cosine branch of Box & Muller (1958); ``|value| < 6.7``, for float64 8.7.

        Args:
            z: The value whose shape, device and dtype the result takes.
            shared: Axes of z along which all elements share one draw.

        Returns:
            [shape of z, 1 along shared axes].
        """
        if z.dim() == 0 and transforms():  # draw [1] instead of 0-d: see functorch.batch_positions
            return Noise.normal(self, z[None])[0]
        z, index = self._drawn_for(z, shared)
        key, lane = self._next(z)
        if z.dtype == torch.float64:
            radius, angle = _fine(key, z, lane, index) + 2.0**-54, _fine(key, z, lane + 2, index)
        else:
            radius = (shift(_bits(key, z, lane, index), 1).to(torch.float32) + 0.5) * 2.0**-31
            angle = shift(_bits(key, z, lane + 1, index), 8).to(torch.float32) * 2.0**-24
        # 2π as a literal: with dynamic=True, Dynamo makes torch.pi an input of the graph, and fails at that in a checkpoint (torch 2.13).
        return (torch.sqrt(-2 * torch.log(radius)) * torch.cos(6.283185307179586 * angle)).to(z.dtype)

    def repeated(self) -> Noise:
        """Return noise that draws the same numbers again, from the first on."""
        return replace(self)

    def _drawn_for(self, z: Tensor, shared: Iterable[int]) -> tuple[Tensor, Tensor | None]:
        """Return a tensor with the shape that a draw for z has: z itself, or z cut to length 1 along the shared axes.

        If z is a rank's part of a value, also return, for each element of this draw, its index in the draw for the whole value; else None.
        """
        axes = {axis % z.dim() for axis in (*self.shared, *shared)}
        if axes:
            z = z.detach()[tuple(slice(0, 1) if axis in axes else slice(None) for axis in range(z.dim()))]
        return z, None if self.window is None else self.window.indices(z.shape, axes, z.device)

    def _next(self, z: Tensor) -> tuple[Tensor, int]:
        """Return the key, on the device of z, and the first lane of the next draw."""
        if self._task is not None and not compiling() and backward_task() != self._task:
            raise GraphRegError(
                "noise of a forward pass is drawn in a backward pass, where the numbers would be different: a formula must not draw inside "
                "torch.utils.checkpoint or in the backward of an autograd.Function. Draw outside and use the result inside; or take "
                "noise.repeated(), which repeats the draws from the first."
            )
        lane = self._drawn * _LANES
        self._drawn += 1
        key = self.key if self.key.device == z.device else self.key.to(z.device)
        return (key_of_row(key) if transforms() else key), lane


def key_of_row(key: Tensor) -> Tensor:
    """Return the key itself, or under ``torch.vmap(..., randomness="different")`` a key for each row, derived from the row's position.

    Raises:
        RandomnessError: ``randomness`` is ``"error"``.
    """
    # In backward, the rows of a vmap are rows of gradients, and the draws must repeat those of the forward.
    if not transforms() or (not compiling() and in_backward()):
        return key
    for level, randomness in vmaps():
        if randomness == "error":
            raise RandomnessError(
                "the module draws noise under torch.vmap (or jacfwd, hessian), whose randomness is 'error'. Give vmap "
                "randomness='different', so that each row has its own mask, or randomness='same', so that all rows share one mask; or call "
                "the module in eval mode."
            )
        if randomness == "different":
            place = batch_positions(level, key.device)
            key = torch.cat([mix(place, *lane_keys(key[:1], key[1:], lane)) for lane in (_ROW, _ROW - 1)])
    return key


_ROW = -1  # no draw uses this lane or the one before it


def _bits(key: Tensor, z: Tensor, lane: int, index: Tensor | None) -> Tensor:
    """Draw random words for z. ``index``: the indices of the elements if z is a rank's part of a value, else None."""
    return bits(key, z.shape, lane) if index is None else words_at(key, index, lane)


def _fine(key: Tensor, z: Tensor, lane: int, index: Tensor | None) -> Tensor:
    """Draw uniform float64 values in [0, 1) with 53 bits, from two lanes."""
    high: Tensor = shift(_bits(key, z, lane, index), 5)
    low: Tensor = shift(_bits(key, z, lane + 1, index), 6)
    return (high.to(torch.float64) * 2.0**26 + low.to(torch.float64)) * 2.0**-53
