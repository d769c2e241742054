"""``Regularized``: the named tuple of output and penalties that a rewritten module returns."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor


class Regularized(NamedTuple):
    """The result of a call of a rewritten module, unless its penalties attach (``penalties="attach"``).

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
