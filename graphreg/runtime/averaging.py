"""Keeps strengths and noise out of weight averaging (``torch.optim.swa_utils.AveragedModel``)."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from graphreg.ir import PLACED
from graphreg.runtime.counter import Counter
from graphreg.runtime.runtime_module import Rules


def averages_follow() -> None:
    """Patch ``AveragedModel.update_parameters``, once, so that strengths and noise are copied to the averaged model, not averaged.

    With ``use_buffers=True`` torch averages all buffers, including those of the runtime modules. A strength that the user sets would lag
    behind, and averaging the integers of a noise stream gives another stream. AveragedModel gives modules no way to prevent this.
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
    """Copy the buffers of the model's runtime modules, and which strengths were set, to the averaged model.

    A model that is regularized in place has both in its state, which is no submodule.
    """
    copies, originals = ([m for m in root.modules() if isinstance(m, Rules)] for root in (averaged, model))
    for copy, original in zip(copies, originals, strict=False):  # not strict: torch takes any model with the same parameters
        theirs = dict(original.named_buffers())
        for name, buffer in copy.named_buffers():
            if name in theirs:
                buffer.copy_(theirs[name])
        # ``chosen`` is what recipes read; set_by_site also decides which elements of a strength splices read
        for name in original.chosen if copy.chosen != original.chosen else ():
            copy.set_by_site(name, original.chosen[name])
        for counter in (child for child in copy.children() if isinstance(child, Counter)):
            counter.free.fill_(counter.frozen_call is None)  # ``free`` was copied above, but each module freezes its noise by itself
    states = ([vars(m)[PLACED] for m in root.modules() if PLACED in vars(m)] for root in (averaged, model))
    for follower, followed in zip(*states, strict=False):
        follower.restore_strengths(followed.changed_strengths())
        follower.set_rng_state(followed.rng_state())
