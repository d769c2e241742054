"""The protocol of a regularizer, the registry of keys, and what is asked of a formula. To write a regularizer, read base.py."""

from graphreg.regularizer.base import Penalty, Regularizer, Splice
from graphreg.regularizer.purity import called
from graphreg.regularizer.registry import OPTIONS, PREFIXED, build, find, registered
from graphreg.regularizer.sequences import check_lengths, lengths_name, sequences
from graphreg.regularizer.trial import require_pure
from graphreg.regularizer.vjp import Pull, known_to_dynamo, recorded, tracked

__all__ = [
    "OPTIONS", "PREFIXED", "Penalty", "Pull", "Regularizer", "Splice", "build", "called", "check_lengths", "find", "known_to_dynamo",
    "lengths_name", "recorded", "registered", "require_pure", "sequences", "tracked",
]  # fmt: skip
