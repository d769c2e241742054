"""What a rewritten module returns: the output and the penalties, as a named tuple."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor


class Regularized(NamedTuple):
    """What a call of a rewritten module returns, unless its penalties attach.

    Attributes:
        output: The model's own output.
        penalties: The penalties by regularizer name, 0-d, already multiplied by their strengths.
    """

    output: Any
    penalties: dict[str, Tensor]

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"this is (output, penalties), which has no {name!r}. Write output, penalties = module(x), or regularize with "
            "penalties='attach' to get the output alone."
        )


Regularized.__module__ = "graphreg"  # emitted code and pickles refer to it by its public name, wherever this file moves
