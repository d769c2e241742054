"""Tries both front ends on a model, for ``graphreg doctor MODEL``: which takes it, in what time, what stays opaque, and what to do."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from graphreg.errors import GraphRegError
from graphreg.tracing.proof.proof import MODES
from graphreg.tracing.trace import FrontEnd, Traced, trace

_OPAQUE = "opaque function: "  # how the notes of a trace on opaque functions begin


@dataclass(frozen=True)
class Attempt:
    """What one front end made of a model.

    Attributes:
        front_end: ``symbolic`` or ``export``.
        seconds: How long it took, the proof included.
        values: How many values have names.
        hidden: How many of them have the role ``hidden``, on which many regularizers act by default.
        opaque: A line for each opaque module and function, with the reason.
        notes: What else the trace says of itself.
        proved: Whether both modes were compared with the model on the inputs.
        refusal: Why it does not take the model; ``""`` if it does.
    """

    front_end: str
    seconds: float
    values: int = 0
    hidden: int = 0
    opaque: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    proved: bool = False
    refusal: str = ""

    @classmethod
    def of(cls, traced: Traced, seconds: float) -> Attempt:
        """Return what a trace says."""
        tensors = [site for site in traced.values if site.selectable]
        functions = [note for note in traced.notes if note.startswith(_OPAQUE)]
        modules = [f"opaque module: {path} ({reason})" for path, reason in traced.opaque_modules.items()]
        return cls(
            traced.front_end, seconds, len(tensors), sum(site.role == "hidden" for site in tensors), (*functions, *modules),
            tuple(note for note in traced.notes if note not in functions), traced.unproved.keys().isdisjoint(MODES),
        )  # fmt: skip

    def lines(self) -> list[str]:
        """Return the attempt as lines of text."""
        if self.refusal:
            return [f"{self.front_end}: no, after {self.seconds:.1f} s", f"  {self.refusal}"]
        proof = "its result is the model's in both modes" if self.proved else "not compared with the model"
        head = f"{self.front_end}: yes, in {self.seconds:.1f} s; {self.values} values have names, {self.hidden} of them hidden; {proof}"
        return [head, *(f"  {line}" for line in (*self.opaque, *self.notes))]


@dataclass(frozen=True)
class FrontEnds:
    """What both front ends made of a model.

    Attributes:
        title: The model's class.
        attempts: An attempt for each front end.
        chosen: The one that ``front_end="auto"`` takes; ``""`` if it takes none.
        advice: What to change.
    """

    title: str
    attempts: tuple[Attempt, ...]
    chosen: str
    advice: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether a front end takes the model."""
        return bool(self.chosen)

    def __str__(self) -> str:
        head = f"front_end='auto' takes {self.title} by {self.chosen}" if self.chosen else f"no front end takes {self.title}"
        lines = [head, *(line for attempt in self.attempts for line in attempt.lines())]
        return "\n".join([*lines, *(f"to do: {line}" for line in self.advice)])

    def to_dict(self) -> dict[str, Any]:
        """Return the result as plain data for ``--json``."""
        return asdict(self)


def try_front_ends(model: nn.Module, example_inputs: Any = None) -> FrontEnds:
    """Trace a model with each front end, and with ``"auto"``, which stays unchanged.

    Args:
        model: The model.
        example_inputs: As ``regularize`` takes them; torch.export needs them.

    Returns:
        What each made of it, and what to change so that more of the model can be seen.
    """
    attempts = [_attempt(model, example_inputs, front_end) for front_end in ("symbolic", "export")]
    auto = _attempt(model, example_inputs, "auto")
    chosen = "" if auto.refusal else auto.front_end
    return FrontEnds(type(model).__name__, tuple(attempts), chosen, tuple(_advice(attempts, auto, example_inputs is not None)))


def _attempt(model: nn.Module, example_inputs: Any, front_end: FrontEnd) -> Attempt:
    start = time.perf_counter()
    try:
        traced = trace(model, example_inputs, front_end)
    except GraphRegError as error:
        return Attempt(front_end, time.perf_counter() - start, refusal=str(error))
    return Attempt.of(traced, time.perf_counter() - start)


def _advice(attempts: list[Attempt], auto: Attempt, has_inputs: bool) -> list[str]:
    advice = []
    if not has_inputs:
        advice.append(
            "give example inputs (--input 2x3x32x32): with them graphreg knows sizes, compares each graph with the model, and can use "
            "torch.export"
        )
    if auto.refusal and has_inputs:
        advice.append(
            "move the step that the error names into a function of its own, at the top level of a file: it may become an opaque function. "
            "Or use the backend, which takes a model in parts: torch.compile(model, backend=graphreg.backend(...))"
        )
    if any("opaque module" in line for line in auto.opaque):
        advice.append(
            "to name the values in an opaque module, move the step that its reason names into a function of its own, at the top level of "
            "a file"
        )
        seen = [each for each in attempts if each.front_end != auto.front_end and not each.refusal and each.values > auto.values]
        advice += [f"front_end={each.front_end!r} names {each.values} values" for each in seen]
    return advice
