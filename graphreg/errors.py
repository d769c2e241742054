"""Every error meant for the caller: what was given, what is allowed, what to do next."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Callable, Iterable
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


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"[:160]


def raising(error: GraphRegError) -> Callable[..., Any]:
    """A function that raises it: for what a compiler would wrap in an error of its own if it were raised at once."""

    def run(*values: Any) -> Any:
        raise error.with_traceback(None)

    return run
