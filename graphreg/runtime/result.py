"""``Regularized`` and ``Kept``: the named tuples that a rewritten module returns."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor


class Regularized(NamedTuple):
    """The result of a call of a rewritten module, unless its penalties attach (``penalties="attach"``) or it keeps values (``keep=``).

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


class Kept(NamedTuple):
    """The result of a call of a rewritten module that was made with ``keep=``.

    Attributes:
        output: The model's own output.
        penalties: The penalties, as in ``Regularized``.
        values: The kept values, by the names that the selector found. A value that only the forward of one mode computes is absent in the
            other mode. The calls of a recurrent cell are one tensor, [time, batch, ...].
    """

    output: Any
    penalties: dict[str, Tensor]
    values: dict[str, Any]

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"this is (output, penalties, values), which has no {name!r}. Write output, penalties, values = module(x); the kept values are "
            "in the dict values."
        )


for _kind in (Regularized, Kept):
    _kind.__module__ = "graphreg"  # emitted code and pickles refer to it by its public name, wherever this file moves


def output_of(result: Any) -> Any:
    """Return the model's own output, given the result of a call of a model or of a rewritten module."""
    return result.output if isinstance(result, (Regularized, Kept)) else result
