"""What a rewritten module remembers of how it was made. Reports, drawings and the verifier read it."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from graphreg.old_pickles import refuse_other
from graphreg.planning import Plan
from graphreg.tracing import Traced

PICKLE_VERSION = 2  # of the form in which a rewritten module is pickled; graphreg 0.1 had none, which counts as 1
VERSION: str = sys.modules["graphreg"].__version__  # an import of the package's own names would close a circle of all rooms


@dataclass(frozen=True)
class BuildRecord:
    """How a rewritten module was made.

    Attributes:
        plan: The plan that was carried out, without the trace that it was made for.
        opaque: The submodules that the trace did not look into, by path, each with the reason.
        specialized: The arguments that were fixed at their value.
        front_end: The name of the front end that traced the model.
        notes: What else the choice of the front end has to tell.
        version: The version of the pickled form.
        made_with: The version of graphreg.
    """

    plan: Plan
    opaque: Mapping[str, str]
    specialized: Mapping[str, Any]
    front_end: str
    notes: tuple[str, ...]
    version: int = PICKLE_VERSION
    made_with: str = VERSION

    @classmethod
    def of(cls, traced: Traced, plan: Plan) -> BuildRecord:
        """The record of a plan that is carried out on a traced model."""
        return cls(replace(plan, traced=None), dict(traced.opaque_modules), dict(traced.specialized), traced.front_end, traced.notes)

    def __setstate__(self, state: dict[str, Any]) -> None:
        require_readable(state.get("version"), state.get("made_with", "0.1"))
        self.__dict__.update(state)


def require_readable(version: int | None, made_with: str) -> None:
    """Refuse a pickle whose form this graphreg does not read."""
    refuse_other(version, made_with, PICKLE_VERSION, VERSION)
