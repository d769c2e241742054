"""Checks that a rewritten module computes what the user's model computes, by running copies of both and comparing every value.

Open ``verify.py`` first: what is run, and what is compared. ``values.py`` walks through outputs and says how two values differ;
``first_difference.py`` finds the first node of the graph that is to blame.
"""

from graphreg.verification.verify import copied, validate, verify

__all__ = [
    "copied", "validate", "verify",
]  # fmt: skip
