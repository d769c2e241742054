"""Keeps strengths and noise out of weight averaging (``torch.optim.swa_utils.AveragedModel``): an average has those of its model.

With ``use_buffers=True`` torch averages all buffers, including those of the runtime modules. A strength that the user sets would lag
behind, and averaging the integers of a noise stream gives another stream. So a *follower* lists no such buffers to an update, and copies
strengths and noise instead. Both happen in ``named_modules``, the one method of a module that an update calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from graphreg.ir.module_record import PLACED
from graphreg.torch_internals.averaging import update_that_lists
from graphreg.torch_internals.modules import lists_like

Listing = Callable[..., Iterator[tuple[str, nn.Module]]]
_FOLLOWS = "graphreg_follows"  # marks the method of a follower


def follow_averages(listing: Listing, hides_buffers: bool) -> Listing:
    """Return the method ``named_modules`` of a follower: of the container of runtime modules, or of a model in place.

    In an update, strengths and noise are copied by ``follow_original``: of the container, or of the state of a model in place.

    Args:
        listing: The method of the base class.
        hides_buffers: Whether an update sees no buffer of the module and of its submodules.
    """

    def named_modules(self: nn.Module, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        update = None if torch.compiler.is_dynamo_compiling() else update_that_lists()
        if update is not None and update.buffers and hides_buffers:
            return iter(())
        if update is not None and not update.buffers:
            ours, theirs = _followers(update.averaged.module), _followers(update.model)
            # The first one does it for all. Not strict, because torch takes any model with the same parameters.
            for copy, original in zip(ours, theirs, strict=False) if ours and ours[0] is self else ():
                with torch.no_grad():
                    vars(copy).get(PLACED, copy).follow_original(vars(original).get(PLACED, original))
        return listing(self, *args, **kwargs)

    setattr(named_modules, _FOLLOWS, True)
    return lists_like(named_modules, listing)


def _followers(root: nn.Module) -> list[nn.Module]:
    return [module for module in root.modules() if hasattr(type(module).named_modules, _FOLLOWS)]
