"""Accounts: what a report is made of. A regularizer, a site and what acts there, a dropout of the model's own, the cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

KEPT = "kept"
Does = Literal["replaces", "measures", "measures first"]  # the last: before the splices at its site


@dataclass(frozen=True)
class Entry:
    """A regularizer. ``selector``: its strings, or the name of its function. ``options``: by name, as text or plain values.

    ``share``: of the elements of all values (or parameters) in [0, 1], None where shapes are not known. ``of``: how many sites of
    its kind there are. ``trains``: the parameters that a penalty trains, None where that is not known; ``frozen``: those that
    it would train.
    """

    name: str
    type: str
    acts_on: str
    strength: float
    selector: tuple[str, ...]
    options: Mapping[str, Any]
    sites: tuple[str, ...]
    of: int
    share: float | None
    penalty: bool
    trains: tuple[str, ...] | None = None
    frozen: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Act:
    """What one regularizer does at a site. ``matched``: the string that chose it. ``gone``: a later pass took it out."""

    regularizer: str
    does: Does
    strength: float
    matched: str
    gone: bool = False


@dataclass(frozen=True)
class Acted:
    """A site and what acts there, in this order. ``calls``: of a cell, whose calls are the steps of one sequence.

    ``shape`` and ``dtype`` are None where they are not known; ``graph``: of several captured ones, the number.
    """

    name: str
    kind: Literal["value", "parameter"]
    op: str
    shape: tuple[int, ...] | None
    dtype: str | None
    acts: tuple[Act, ...]
    calls: int = 1
    graph: int | None = None


@dataclass(frozen=True)
class OwnRow:
    """A dropout of the model's own. ``acts``: ``"mode"``, ``"always"`` or ``"never"``; ``why_not``: why it cannot be moved."""

    site: str
    op: str
    rate: float | None
    acts: str
    becomes: str
    matched: str = ""
    why_not: str = ""


@dataclass(frozen=True)
class Cost:
    """Of one forward pass in train mode, eager. By name of a regularizer, or of what belongs to none (``"keys"``, ``"copies"``).

    ``operations``: multiplications and additions of products, else one an element. ``kept``: bytes kept for backward, less what is
    kept no more. ``model_operations``, ``model_kept``: of the model by itself.
    """

    operations: Mapping[str, int]
    kept: Mapping[str, int]
    model_operations: int
    model_kept: int
