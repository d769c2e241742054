"""Carries out a plan on a copy of the model's graphs, checks the result, and undoes it again (``graphreg.strip``).

Nothing outside of this room edits an fx graph of the model. Open ``rewrite.py`` first. ``invariants.py`` checks every rewritten
module against the traced model and the plan, ``substitute.py`` replaces calls of native dropout, ``monitor_watches.py`` places the
monitor's watches.
"""

from graphreg.rewriting.insertions import Insertion, Insertions, Position
from graphreg.rewriting.instantiate import check_rng, measures, seed
from graphreg.rewriting.monitor_watches import Clock, Watch, place, remove
from graphreg.rewriting.plan_lowering import lower
from graphreg.rewriting.rewrite import rewrite
from graphreg.rewriting.strip import strip
from graphreg.rewriting.substitute import restored

__all__ = [
    "Clock", "Insertion", "Insertions", "Position", "Watch", "check_rng", "lower", "measures", "place", "remove", "restored",
    "rewrite", "seed", "strip",
]  # fmt: skip
