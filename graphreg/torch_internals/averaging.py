"""``torch.optim.swa_utils.AveragedModel``: notices that an update lists the members of a module."""

from __future__ import annotations

import inspect
import sys
from typing import Any, NamedTuple

from torch import nn
from torch.optim.swa_utils import AveragedModel

_UPDATE = inspect.unwrap(AveragedModel.update_parameters).__code__
_BUFFERS = nn.Module.buffers.__code__
# what runs between an update and the listing of a submodule's modules
_LISTING = {getattr(nn.Module, name).__code__ for name in ("named_modules", "_named_members", "parameters", "named_parameters", "buffers")}
_LISTING.add(nn.Module.named_buffers.__code__)


class Update(NamedTuple):
    """An update of an average that lists modules now. ``buffers``: whether for their buffers, and not for their parameters."""

    averaged: Any
    model: nn.Module
    buffers: bool


def update_that_lists() -> Update | None:
    """Return the update of an ``AveragedModel`` for which the caller's caller lists its modules; None if no update asks.

    An update averages what the modules of the two models list, and calls nothing of theirs but ``named_modules``. So the code on the stack
    tells why a module is asked for its submodules. The class ``AveragedModel`` stays as torch made it.
    """
    caller = sys._getframe(1).f_code
    frame, buffers = sys._getframe(2), False
    while (code := frame.f_code) in _LISTING or code is caller:
        buffers = buffers or code is _BUFFERS
        if frame.f_back is None:
            return None
        frame = frame.f_back
    return Update(frame.f_locals["self"], frame.f_locals["model"], buffers) if code is _UPDATE else None
