"""``BuildRecord``: how a rewritten module was made. The module keeps it, and reports, drawings and the verifier read it."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from graphreg.errors import number_of
from graphreg.ir.selector import Missing
from graphreg.old_pickles import refuse_other
from graphreg.planning.kept import Keep
from graphreg.planning.native_dropout import OwnDropout
from graphreg.planning.plan import Plan
from graphreg.regularizer.base import Regularizer
from graphreg.tracing.trace import Traced

# the version of the pickled form of a rewritten module: 2 in graphreg 0.2; a pickle of 0.1 has none
PICKLE_VERSION = 3
VERSION: str = sys.modules["graphreg"].__version__  # not imported: a room may import only rooms above it, not the whole package


GIVEN_IN_THE_CALL = "given in the call"  # stands in a recipe for a scale that is not a number, but a GradScaler or a function


@dataclass(frozen=True)
class Asked:
    """The arguments that a module was made with, apart from the model and its inputs. A recipe consists of them.

    Attributes:
        regularizers: The regularizers by their final names.
        seeds: The seeds of the noise. Under the name of a regularizer: the seed of a splice that has a seed of its own. Under ``""``: the
            seed of all other noise. Empty if no seed was given or drawn, as for a plan.
        front_end: The front end that was asked for; None for ``"auto"``.
        missing: As in ``regularize``.
        own_dropout: As in ``regularize``.
        penalties: ``"return"`` or ``"attach"``; None for a plan.
        scale: The scale, if it was a number or a 0-d tensor; ``GIVEN_IN_THE_CALL`` if it was anything else; None if no scale was given.
        eval_penalties: As in ``regularize_``.
        blocks: Selectors, as strings, of the modules that the emitted code calls as modules, as in ``regularize``.
        keep: As in ``regularize``.
    """

    regularizers: Mapping[str, Regularizer]
    seeds: Mapping[str, int] = field(default_factory=dict)
    front_end: str | None = None
    missing: Missing = "error"
    own_dropout: OwnDropout = "keep"
    penalties: str | None = None
    scale: float | str | None = None
    eval_penalties: bool = False
    blocks: tuple[str, ...] = ()
    keep: Keep | None = None


def written_scale(scale: Any) -> float | str | None:
    """Return a scale in the form that ``Asked.scale`` has, which can be written into a recipe."""
    return scale if scale is None else number if (number := number_of(scale)) is not None else GIVEN_IN_THE_CALL


@dataclass(frozen=True)
class BuildRecord:
    """How a rewritten module was made.

    Attributes:
        plan: The plan that was carried out, without the trace that it was made from.
        opaque: The opaque modules by path, each with the reason why the tracer could not see into it.
        specialized: The specialized arguments, each with the value at which the graph fixes it.
        front_end: The name of the front end that traced the model.
        notes: Remarks on the trace, such as why this front end was chosen.
        seeds: The seeds, as in ``Asked``.
        penalties: As in ``Asked``.
        scale: As in ``Asked``.
        asked_front_end: The ``front_end`` of ``Asked``.
        version: The version of the pickled form.
        made_with: The version of graphreg that made the module.
    """

    plan: Plan
    opaque: Mapping[str, str]
    specialized: Mapping[str, Any]
    front_end: str
    notes: tuple[str, ...]
    seeds: Mapping[str, int] = field(default_factory=dict)
    penalties: str = "return"
    scale: float | str | None = None
    asked_front_end: str | None = None
    version: int = PICKLE_VERSION
    made_with: str = VERSION

    @classmethod
    def of(cls, traced: Traced, plan: Plan, seeds: Mapping[str, int], penalties: str, scale: Any) -> BuildRecord:
        """Return the record for a plan that is carried out on a traced model."""
        traced_as = dict(traced.opaque_modules), dict(traced.specialized), traced.front_end, traced.notes
        asked = None if traced.asked_front_end == "auto" else traced.asked_front_end
        # The record is pickled with the module, and a trace holds the model that was traced.
        return cls(replace(plan, traced=None), *traced_as, dict(seeds), penalties, written_scale(scale), asked)

    @property
    def asked(self) -> Asked:
        """The arguments that the module was made with."""
        plan, front_end = self.plan, self.asked_front_end
        given = (front_end, plan.missing, plan.own_dropout, self.penalties, self.scale)
        return Asked(plan.regularizers, self.seeds, *given, blocks=plan.asked_blocks, keep=plan.keep)

    def __setstate__(self, state: dict[str, Any]) -> None:
        require_readable(state.get("version"), state.get("made_with", "0.1"))
        self.__dict__.update(state)


def require_readable(version: int | None, made_with: str) -> None:
    """Raise GraphRegError for a pickle in a form that this version of graphreg does not read."""
    refuse_other(version, made_with, PICKLE_VERSION, VERSION)
