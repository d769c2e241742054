"""Every error meant for the caller: what was given, what is allowed, what to do next."""

from __future__ import annotations

import contextlib
import difflib
import math
import numbers
import reprlib
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any


class GraphRegError(Exception):
    """The root of every error that graphreg raises on purpose."""


class TraceError(GraphRegError):
    """A model that cannot be traced, or that must not be traced again."""


class NoMatchError(GraphRegError, LookupError):
    """A name, key or selector that finds nothing (or another number of things than asked for)."""


class RegularizerError(GraphRegError, ValueError):
    """A regularizer, option or value that is not allowed."""


class RandomnessError(GraphRegError, RuntimeError):
    """A draw under ``torch.vmap`` that was not told whether its rows shall agree; a RuntimeError, as torch's own is."""


def near(word: str, words: Iterable[str], count: int = 3) -> list[str]:
    """The ``count`` words most like ``word``, likest first; wildcards in it are ignored."""
    bare = word.strip("!*?. ")
    return difflib.get_close_matches(bare or word, list(dict.fromkeys(words)), n=count, cutoff=0.4)


def near_sentence(word: str, words: Iterable[str], what: str = "Near names") -> str:
    """`` Near names: a, b.``, or nothing when nothing is near."""
    found = near(word, words)
    return f" {what}: {', '.join(found)}." if found else ""


def shown(value: object) -> str:
    """A value as an error quotes it: of a tensor its shape, of a long text the beginning and the end."""
    if (shape := getattr(value, "shape", None)) is not None and getattr(value, "dtype", None) is not None:
        return f"{type(value).__name__} of shape {tuple(shape)}"
    short = reprlib.Repr()
    short.maxother = short.maxstring = short.maxlong = 80
    return short.repr(value)


def number_of(value: Any) -> float | None:
    """A finite real number as a float, that of a tensor or an array of no dims too; None for anything else."""
    if getattr(value, "shape", None) == () and not getattr(value, "requires_grad", False):
        with contextlib.suppress(RuntimeError, NotImplementedError):  # a tensor on the meta device has no number
            value = value.item()
    with contextlib.suppress(OverflowError):  # an integer that no float can hold is not finite either
        if isinstance(value, numbers.Real) and math.isfinite(value):
            return float(value)
    return None


def no_number(what: str, value: Any, cure: str) -> str:
    """The sentence for a value that is no finite number. ``cure``: what to write in this place."""
    cure = numeric_text(value) + cure
    if getattr(value, "requires_grad", False):
        cure = (
            f"It is a tensor that would be trained, and a number in its place would not be: give {what.rpartition(' ')[2]}.item(). {cure}"
        )
    return f"{what} is {value!r}; it must be a finite number. {cure}"


def numeric_text(value: object) -> str:
    """A sentence for a number that is a text; nothing for anything else."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            float(value)
            return "A number in quotes is a text: take the quotes away. YAML reads 1e-4 as a text, too: its numbers need a dot, 1.0e-4. "
    return ""


def warn(sentence: str) -> None:
    """Warn at the line of the user's code that called graphreg."""
    frame, level = sys._getframe(), 1
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).partition(".")[0] == "graphreg":
        frame, level = frame.f_back, level + 1
    warnings.warn(sentence, stacklevel=level)


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"[:160]


def raising(error: GraphRegError) -> Callable[..., Any]:
    """A function that raises it: for what a compiler would wrap in an error of its own if it were raised at once."""

    def run(*values: Any) -> Any:
        raise error.with_traceback(None)

    return run


def listed(names: Sequence[str], most: int = 6) -> str:
    """The first of some names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
