"""Adds Dynamo guards for what a rewritten graph depends on: the modes of the modules that own its sites, and the module that runs it.

Dynamo guards on ``training`` only where a forward reads it, and may use one graph for all modules of a class. Both would be wrong here:
whether a splice acts depends on its module's mode, and a site is named after one module. So each graph gets additional guards.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from graphreg.dynamo_backend.capture_place import Place, here
from graphreg.torch_internals.dynamo import guard_identity, guard_value


class Watched:
    """The object that the guard reads. ``now`` is a tuple of all that a graph depends on.

    It has the modes of ``owners``, whether noise is switched on or off, and the path of the running module.

    ``paths``: the paths of the model's modules by id; None if another guard checks which module runs the graph.
    """

    def __init__(self, owners: list[nn.Module], switched: Callable[[], bool | None], paths: Mapping[int, str] | None) -> None:
        self.owners, self.switched, self.paths = [weakref.ref(owner) for owner in owners], switched, paths

    @property
    def now(self) -> tuple[Any, ...]:
        modes = [owner.training if (owner := ref()) is not None else None for ref in self.owners]
        path = here(dict(self.paths)) if self.paths is not None else None
        return (*modes, self.switched(), path)


def guard(translator: Any, place: Place, watched: Watched) -> None:
    """Have Dynamo capture the code again when ``watched.now`` has changed, or when another module runs the code."""
    if place.local is not None:
        guard_identity(place.local)
    guard_value(translator, "__graphreg_watched", watched, "now", by_module=watched.paths is not None)
