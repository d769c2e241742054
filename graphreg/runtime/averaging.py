"""Averages of a model's weights, as ``torch.optim.swa_utils`` takes them: strengths and noise are no weights."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from graphreg.runtime.leaf import Rules


def averages_follow() -> None:
    """Have AveragedModel's update give the copy the strengths and the noise that the module has.

    With ``use_buffers=True`` it averages all buffers, those of the additions too: a strength that is set lags behind, and the words
    of a stream are rounded to other streams. It asks nothing of the modules that it averages, so its update is extended, once.
    """
    theirs = AveragedModel.update_parameters
    if getattr(theirs, "graphreg_follows", False):
        return

    @functools.wraps(theirs)
    def update_parameters(self: AveragedModel, model: nn.Module) -> None:
        theirs(self, model)
        _follow(self.module, model)

    update_parameters.graphreg_follows = True  # type: ignore[attr-defined]
    AveragedModel.update_parameters = update_parameters  # type: ignore[method-assign]


@torch.no_grad()
def _follow(averaged: Any, model: nn.Module) -> None:
    copies, originals = ([m for m in root.modules() if isinstance(m, Rules)] for root in (averaged, model))
    for copy, original in zip(copies, originals, strict=False):  # torch takes any model whose tensors fit
        theirs = dict(original.named_buffers())
        for name, buffer in copy.named_buffers():
            if name in theirs:
                buffer.copy_(theirs[name])
