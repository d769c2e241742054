"""Carries out a plan on copies of the model's graphs, checks the result, and removes the additions again (``graphreg.strip``).

No other room edits an fx graph of the model. Open ``rewrite.py`` first. ``instantiate.py`` makes the runtime modules of a plan.
``plan_lowering.py`` decides which nodes are inserted, and where; ``insertions.py`` has the records that describe these nodes.
``invariants.py`` checks every rewritten module against the traced model. ``substitute.py`` restores the model's own calls, such as those of
native dropout, and ``monitor_watches.py`` places the watches of a monitor. ``first_call.py`` proves the graph of a model that was traced
without inputs.
"""

from graphreg.rewriting.first_call import is_eager, may_be_proved, prove_mode
from graphreg.rewriting.insertions import Insertion, Insertions, Position
from graphreg.rewriting.instantiate import check_rng, device_of, measures, seed
from graphreg.rewriting.monitor_watches import Clock, Watch, place, remove
from graphreg.rewriting.plan_lowering import lower
from graphreg.rewriting.rewrite import rewrite, rewrite_with
from graphreg.rewriting.strip import strip
from graphreg.rewriting.substitute import restored, with_native_dropout

__all__ = [
    "Clock", "Insertion", "Insertions", "Position", "Watch", "check_rng", "device_of", "is_eager", "lower", "may_be_proved", "measures",
    "place", "prove_mode", "remove", "restored", "rewrite", "rewrite_with", "seed", "strip", "with_native_dropout",
]  # fmt: skip
