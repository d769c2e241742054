"""Chooses floating-point types by device: not every device has float64 (Apple's MPS has none)."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


def has_float64(device: torch.device) -> bool:
    """Whether tensors of float64 can be on the device."""
    return device.type in ("cpu", "meta") or _tried(device.type)


@cache
def _tried(kind: str) -> bool:
    try:
        torch.empty(0, dtype=torch.float64, device=kind)
    except (TypeError, RuntimeError):
        return False
    return True


def widest(device: torch.device) -> torch.dtype:
    """float64, or float32 where that is missing."""
    return torch.float64 if has_float64(device) else torch.float32


def brought(tensor: Tensor, device: torch.device) -> Tensor:
    """Move a tensor to a device, as float32 where the device lacks float64."""
    narrow = tensor.dtype == torch.float64 and not has_float64(device)
    return tensor.to(torch.float32).to(device) if narrow else tensor.to(device)
