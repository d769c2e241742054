"""The plan carried out on a copy of the graph, checked, and undone again by strip."""

from graphreg.rewriting.instantiate import check_rng, measures, seed
from graphreg.rewriting.rewrite import rewrite
from graphreg.rewriting.strip import strip
from graphreg.rewriting.substitute import restored
from graphreg.rewriting.watches import Clock, Watch, place, remove

__all__ = [
    "Clock", "Watch", "check_rng", "measures", "place", "remove", "restored", "rewrite", "seed", "strip",
]  # fmt: skip
