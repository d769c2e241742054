"""The rewritten module run against the user's own model, value for value."""

from graphreg.verification.verify import copied, validate, verify

__all__ = [
    "copied", "validate", "verify",
]  # fmt: skip
