"""The protocol of a regularizer: base classes, the registry of keys, and the checks on a formula.

To write a regularizer, open ``base.py``: subclass ``Splice`` or ``Penalty`` and write ``__call__``,
which is called the *formula*. Some of the other files prepare arguments of formulas
(``sequences.py``, ``units.py``, ``vjp.py``). ``by_depth.py`` has strengths that differ by depth.
``purity.py`` and ``purity_trial.py`` check that a formula is a pure function of its arguments.
"""

from graphreg.regularizer.base import On, Penalty, Regularizer, Splice
from graphreg.regularizer.by_depth import ByDepth, by_depth, extremes, has_schedule, own_strength, read_strength
from graphreg.regularizer.formula_arguments import VJP_NAMES
from graphreg.regularizer.model_inputs import ModelInput, inputs_text
from graphreg.regularizer.options import required
from graphreg.regularizer.purity import called, is_proven
from graphreg.regularizer.purity_trial import require_pure
from graphreg.regularizer.registry import OPTIONS, PREFIXED, build, find, registered
from graphreg.regularizer.sequences import check_lengths, sequences, splice_steps
from graphreg.regularizer.shared_axes import shared_axes
from graphreg.regularizer.units import units_at, units_note
from graphreg.regularizer.vjp import Vjp, recorded, tracked

__all__ = [
    "OPTIONS", "PREFIXED", "VJP_NAMES", "ByDepth", "ModelInput", "On", "Penalty", "Regularizer", "Splice", "Vjp", "build", "by_depth",
    "called", "check_lengths", "extremes", "find", "has_schedule", "inputs_text", "is_proven", "own_strength", "read_strength",
    "recorded", "registered", "require_pure", "required", "sequences", "shared_axes", "splice_steps", "tracked", "units_at", "units_note",
]  # fmt: skip
