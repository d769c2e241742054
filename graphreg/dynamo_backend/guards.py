"""Adds Dynamo guards for what a rewritten graph depends on: the modes of the modules that own its sites, and which module it is of.

Dynamo guards on ``training`` only where a forward reads it, and lets one graph serve all modules of a class. Both would be wrong here: a
splice acts by its module's mode, and sites have the names of one module. So each graph gets two more guards.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from torch._dynamo.guards import GuardBuilder, install_guard
from torch._dynamo.source import AttrSource, GlobalSource, LocalSource
from torch._guards import Guard

from graphreg.torch_internals import Place, here


class Watched:
    """The object that the guard reads: ``now`` has the modes, whether the noise is forced on, and the module's path, as one tuple."""

    def __init__(self, owners: list[nn.Module], forced: Callable[[], bool], paths: Mapping[int, str] | None) -> None:
        self.owners, self.forced, self.paths = [weakref.ref(owner) for owner in owners], forced, paths

    @property
    def now(self) -> tuple[Any, ...]:
        modes = [owner.training if (owner := ref()) is not None else None for ref in self.owners]
        path = here(sys._getframe(1), dict(self.paths)) if self.paths is not None else None
        return (*modes, self.forced(), path)


def guard(translator: Any, place: Place, watched: Watched) -> None:
    """Have Dynamo capture the code again if what is ``watched`` has changed, or if another module runs it."""
    if place.local is not None:
        install_guard(LocalSource(place.local, is_input=True).make_guard(GuardBuilder.ID_MATCH))
    name = translator.output.install_global_by_id("__graphreg_watched", watched)
    source = AttrSource(GlobalSource(name), "now")
    install_guard(source.make_guard(_of_one_module if watched.paths is not None else GuardBuilder.EQUALS_MATCH))


def _of_one_module(builder: GuardBuilder, guard: Guard) -> None:
    """Guard on equality, as on a module: Dynamo then does not count the graphs of other modules as recompilations."""
    builder.EQUALS_MATCH(guard)
    watched = builder.get(guard.originating_source.base)  # type: ignore[attr-defined]
    builder.id_matched_objs["graphreg"] = weakref.ref(watched)
