"""Defines graphreg's exceptions, and functions that make parts of their messages, such as suggestions and short texts for values.

The message of an error names the value that was given, the values that are allowed, and the next
step for the user.
"""

from __future__ import annotations

import contextlib
import difflib
import math
import numbers
import reprlib
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar


class GraphRegError(Exception):
    """The base class of every error that graphreg raises on purpose."""


class TraceError(GraphRegError):
    """The model cannot be traced. For example, its forward branches on the values of tensors, or the model is wrapped or rewritten."""


class NoMatchError(GraphRegError, LookupError):
    """A name, key or selector matches nothing, or a selector does not match as many sites as ``expect=`` says."""


class OtherInputs(GraphRegError):
    """A graph is called with inputs, modes or flags for which it was not made. Another trace would make a graph for this call."""


class RegularizerError(GraphRegError, ValueError):
    """A regularizer, option or value is not allowed."""


class RandomnessError(GraphRegError, RuntimeError):
    """Noise is drawn where it is not known which mask to draw, such as under ``torch.vmap`` with ``randomness="error"``.

    With this option, the caller of ``torch.vmap`` has not said whether all rows share one mask.
    This exception is also a RuntimeError, because torch raises a RuntimeError for its own random
    operations in the same place.
    """


class UntestedTorchWarning(UserWarning):
    """The installed torch is newer than every version of torch with which this version of graphreg was tested."""


def suggestions(word: str, words: Iterable[str]) -> list[str]:
    """Return up to three of ``words`` that are close to ``word``, the closest first. Wildcards at the ends of ``word`` are ignored."""
    bare = word.strip("!*?. ")
    # A word of wildcards alone would be empty without them.
    return difflib.get_close_matches(bare or word, list(dict.fromkeys(words)), n=3, cutoff=0.4)


def suggestions_text(word: str, words: Iterable[str], what: str = "Near names") -> str:
    """Return the suggestions for ``word`` as a sentence to append, such as `` Near names: a, b.``; ``""`` if no word is close."""
    close = suggestions(word, words)
    return f" {what}: {', '.join(close)}." if close else ""


def shown(value: object) -> str:
    """Return a short text for a value in an error message. A tensor is shown by type and shape, a long value by its beginning and end."""
    # The ``repr`` of a tensor has its numbers, on several lines. Some objects raise if they are asked (np.nditer).
    with contextlib.suppress(Exception):
        if (shape := getattr(value, "shape", None)) is not None and getattr(value, "dtype", None) is not None:
            return f"{type(value).__name__} of shape {tuple(shape)}"
    short = reprlib.Repr()
    short.maxother = short.maxstring = short.maxlong = 80
    return short.repr(value)


def number_of(value: Any) -> float | None:
    """Return a finite real number as a float, also from a 0-d tensor or array that does not require grad; None for anything else."""
    if getattr(value, "shape", None) == () and not getattr(value, "requires_grad", False):
        # item() raises for a tensor on the meta device
        with contextlib.suppress(RuntimeError, NotImplementedError):
            value = value.item()
    # math.isfinite raises OverflowError for an integer too large for a float
    with contextlib.suppress(OverflowError):
        if isinstance(value, numbers.Real) and math.isfinite(value):
            return float(value)
    return None


ROUNDS_TO_1 = 1 - 2.0**-25  # from this number on, float32 rounds a number below 1 to 1


def no_number(what: str, value: Any, cure: str) -> str:
    """Return the error message for a value that is not a finite number.

    Args:
        what: The class and the argument that the value was given for, for example
            ``"WeightL2: weight"``.
        value: The value that was given.
        cure: A sentence that says what to write instead.
    """
    cure = numeric_text(value) + cure
    if callable(value) and not hasattr(value, "dtype"):
        cure = f"A strength that changes is a schedule, such as graphreg.schedules.linear(0, 0.1, 1000). {cure}"
    if isinstance(value, str) and "(" in value:
        forms = "{'linear': [0, 0.5, 1000]}, {'piecewise': [[0, 0.0], [1000, 0.1]]}, {'by_depth': [0, 0.2]}"
        cure = f"A schedule, or a strength by depth, is no text; as data it is a dict: {forms}. {cure}"
    if getattr(value, "requires_grad", False):
        cure = f"It is a tensor that requires grad, and graphreg would not train it: give {what.rpartition(' ')[2]}.item(). {cure}"
    return f"{what} is {value!r}; it must be a finite number. {cure}"


def numeric_text(value: object) -> str:
    """Return a hint to put before another sentence if the value is a number in quotes, such as ``"1e-4"``; ``""`` for any other value."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            float(value)
            return "A number in quotes is a string: remove the quotes. YAML reads 1e-4 as a string, too: write it with a dot, 1.0e-4. "
    return ""


def warn(sentence: str, category: type[Warning] = UserWarning) -> None:
    """Issue a warning that points at the line of the user's code that called graphreg."""
    frame, level = sys._getframe(), 1
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).partition(".")[0] == "graphreg":
        frame, level = frame.f_back, level + 1
    warnings.warn(sentence, category, stacklevel=level)


class RenamedAttributes:
    """A base class for objects whose attributes had other names in graphreg 0.1. An old name works, with a DeprecationWarning.

    Attributes:
        renamed: The present name of each renamed attribute, by its old name.
    """

    renamed: ClassVar[Mapping[str, str]] = {}

    if not TYPE_CHECKING:  # hidden from type checkers, so that they report an old name as an error

        def __getattr__(self, name: str) -> Any:
            title, now = type(self).__name__, type(self).renamed.get(name)
            if now is None:
                raise AttributeError(f"{title!r} object has no attribute {name!r}", name=name, obj=self)
            warn(f"{title}.{name} is called {title}.{now} now.", DeprecationWarning)
            return getattr(self, now)


def first_line(error: BaseException) -> str:
    """Return an exception's class and the first line of its message, at most 160 characters."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"[:160]


def raising(error: GraphRegError) -> Callable[..., Any]:
    """Return a function that raises ``error`` when called.

    graphreg's backend returns this function to Dynamo in place of a compiled graph, so the error is
    raised when the graph runs. If the backend raised the error itself, Dynamo would wrap it in an
    error of its own.
    """

    def run(*values: Any) -> Any:
        # Otherwise the traceback would grow with each call, and keep the frames alive.
        raise error.with_traceback(None)

    return run


def listed(names: Sequence[str], most: int = 6) -> str:
    """Return up to ``most`` of the names, joined by commas, and the number of the other names, for a message."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def check_flag(name: str, value: object) -> None:
    """Raise RegularizerError unless the value of the option ``name`` is True or False."""
    if not isinstance(value, bool):
        raise RegularizerError(f"{name}={shown(value)} is not allowed; give True or False.")
