"""The plan carried out on a copy of the graph, checked, and undone again by strip."""

from graphreg.rewriting.insertions import Insertion, Insertions, Position
from graphreg.rewriting.instantiate import check_rng, measures, seed
from graphreg.rewriting.lowering import lower
from graphreg.rewriting.rewrite import rewrite
from graphreg.rewriting.strip import strip
from graphreg.rewriting.substitute import is_own, restored
from graphreg.rewriting.watches import Clock, Watch, place, remove

__all__ = [
    "Clock", "Insertion", "Insertions", "Position", "Watch", "check_rng", "is_own", "lower", "measures", "place", "remove",
    "restored", "rewrite", "seed", "strip",
]  # fmt: skip
