"""Finds the Triton kernels for a draw in eager code on a GPU. Without them, a draw takes some twenty small operators there.

A launch takes longer than the arithmetic of most draws, so one kernel takes about as long as one of
torch's operators.
"""

from __future__ import annotations

import importlib
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor

from graphreg.rng.hash import launches, words

# the dtypes of masks that the kernel writes
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@cache
def _triton() -> Any:
    """Return ``triton_kernels.py``; None if Triton is not installed, or is too old for the file."""
    try:
        return importlib.import_module("graphreg.rng.triton_kernels")
    except (ImportError, AttributeError):
        return None


def kernels_for(key: Tensor) -> Any:
    """Return ``triton_kernels.py`` if its kernels can draw from a key now, else None."""
    return _triton() if launches(key) else None


def on_device(key: Tensor) -> AbstractContextManager[Any]:
    """Open a block in which kernels run on the key's GPU, because Triton launches them on the current one."""
    return torch.cuda.device(key.device) if key.device.type == "cuda" else nullcontext()


def drawn_words(key: Tensor, count: int, lane: int, start: int) -> Tensor:
    """Hash ``count`` indices from ``start`` on, as ``hash.words`` does, by one kernel where that is possible."""
    kernels = kernels_for(key)
    if kernels is None:
        return words(key, count, lane, start)
    with on_device(key):
        drawn: Tensor = kernels.words(key, count, lane, start)
    return drawn


def drawn_mask(key: Tensor, rate: Tensor, z: Tensor, lane: int) -> Tensor | None:
    """Draw a mask for z by one kernel, in z's dtype; None if that is impossible."""
    kernels = kernels_for(key)
    if kernels is None or not launches(rate) or z.dtype not in _FLOATS:
        return None
    with on_device(key):
        mask: Tensor = kernels.keep(key, rate.detach(), z.shape, lane, z.dtype)
    return mask


def drawn_keys(streams: Tensor, call: Tensor) -> Tensor | None:
    """Compute the keys of one call by one kernel; None if that is impossible. Arguments as in ``noise.call_keys``."""
    kernels = kernels_for(streams)
    if kernels is None or not launches(call) or call.numel() != 1:
        return None
    with on_device(streams):
        keys: Tensor = kernels.call_keys(streams, call)
    return keys
