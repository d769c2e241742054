"""What a captured graph depends on and Dynamo does not see: the modes of the modules that own its sites, and whose code it is.

Dynamo guards on ``training`` only where a forward reads it, and one graph serves all modules of a class. Both would be wrong
here: a splice acts by its module's mode, and sites have the names of one module. So a graph gets two guards more.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from graphreg.dynamo_backend.place import Place, here
from graphreg.torch_internals import guard_identity, guard_value


class Watched:
    """What the guard reads, as one tuple."""

    def __init__(self, owners: list[nn.Module], forced: Callable[[], bool], paths: Mapping[int, str] | None) -> None:
        self.owners, self.forced, self.paths = [weakref.ref(owner) for owner in owners], forced, paths

    @property
    def now(self) -> tuple[Any, ...]:
        modes = [owner.training if (owner := ref()) is not None else None for ref in self.owners]
        path = here(dict(self.paths)) if self.paths is not None else None
        return (*modes, self.forced(), path)


def guard(translator: Any, place: Place, watched: Watched) -> None:
    """Have Dynamo capture the code again where what is ``watched`` has changed, or another module runs it."""
    if place.local is not None:
        guard_identity(place.local)
    guard_value(translator, "__graphreg_watched", watched, "now", by_module=watched.paths is not None)
