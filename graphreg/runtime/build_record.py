"""``BuildRecord``: how a rewritten module was made. The module keeps it, and reports, drawings and the verifier read it."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from graphreg.old_pickles import refuse_other
from graphreg.planning import Plan
from graphreg.tracing import Traced

PICKLE_VERSION = 2  # of the pickled form of a rewritten module; pickles of graphreg 0.1 have no version, which counts as 1
VERSION: str = sys.modules["graphreg"].__version__  # not imported: every room may import only rooms above it, not the whole package


@dataclass(frozen=True)
class BuildRecord:
    """How a rewritten module was made.

    Attributes:
        plan: The plan that was carried out, without the trace that it was made for.
        opaque: The opaque modules by path, each with the reason why the tracer could not see into it.
        specialized: The specialized arguments, each with the value at which the graph fixes it.
        front_end: The name of the front end that traced the model.
        notes: Remarks on the trace, such as why this front end was chosen.
        version: The version of the pickled form.
        made_with: The version of graphreg that made the module.
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
        """Return the record for a plan that is carried out on a traced model."""
        return cls(replace(plan, traced=None), dict(traced.opaque_modules), dict(traced.specialized), traced.front_end, traced.notes)

    def __setstate__(self, state: dict[str, Any]) -> None:
        require_readable(state.get("version"), state.get("made_with", "0.1"))
        self.__dict__.update(state)


def require_readable(version: int | None, made_with: str) -> None:
    """Raise GraphRegError for a pickle in a form that this version of graphreg does not read."""
    refuse_other(version, made_with, PICKLE_VERSION, VERSION)
