"""Chooses floating-point types by device (Apple's MPS has no float64), and a device for what must have values."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
from torch import Tensor


def has_float64(device: torch.device) -> bool:
    """Return whether the device can have float64 tensors."""
    return device.type in ("cpu", "meta") or _makes_float64(device.type)


@cache
def _makes_float64(kind: str) -> bool:
    try:
        torch.empty(0, dtype=torch.float64, device=kind)
    except (TypeError, RuntimeError):
        return False
    return True


def widest(device: torch.device) -> torch.dtype:
    """Return float64, or float32 if the device has no float64."""
    return torch.float64 if has_float64(device) else torch.float32


def brought(tensor: Tensor, device: torch.device) -> Tensor:
    """Move a tensor to a device. A float64 tensor becomes float32 if the device has no float64."""
    narrow = tensor.dtype == torch.float64 and not has_float64(device)
    return tensor.to(torch.float32).to(device) if narrow else tensor.to(device)


def with_values() -> AbstractContextManager[object]:
    """Return a context in which tensors have values: where meta is torch's default device, the context makes it the CPU."""
    return torch.device("cpu") if torch.get_default_device().type == "meta" else nullcontext()
