"""The pairs of Python and torch that are run, and which of them ``ONLY`` means."""

from __future__ import annotations

import re
from typing import NamedTuple


class Pair(NamedTuple):
    """A minor version of Python and one of torch, as "3.13" and "2.15"."""

    python: str
    torch: str

    def __str__(self) -> str:
        return f"{self.python} {self.torch}"


TORCHES = {"3.11": ("2.10", "2.11", "2.12", "2.13", "2.14", "2.15"), "3.13": ("2.10", "2.13", "2.15")}
PAIRS = tuple(Pair(python, torch) for python, torches in TORCHES.items() for torch in torches)


def chosen(only: str | None) -> list[Pair]:
    """The pairs that ``only`` means: "3.13 2.15" is one, "3.13" or "2.15" all with that version, a comma joins several.

    A pair that is not among the usual ones may be named in full.

    Raises:
        LookupError: A part of ``only`` is no version, or means no pair.
    """
    if only is None:
        return list(PAIRS)
    return list(dict.fromkeys(pair for part in only.split(",") for pair in _of_part(part.split(), part.strip())))


def _of_part(words: list[str], part: str) -> list[Pair]:
    wrong = [word for word in words if not re.fullmatch(r"[23]\.\d+", word)]
    pythons, torches = ([word for word in words if word.startswith(f"{major}.")] for major in (3, 2))
    if wrong or not words or len(pythons) > 1 or len(torches) > 1:
        raise LookupError(f"ONLY={part!r} is no pair. Write a Python, a torch or both, as in ONLY='3.13 2.15'.")
    if pythons and torches:
        return [Pair(pythons[0], torches[0])]
    found = [pair for pair in PAIRS if words[0] in pair]
    if not found:
        usual = ", ".join(sorted({version for pair in PAIRS for version in pair}, key=lambda text: [*map(int, text.split("."))]))
        raise LookupError(f"ONLY={part!r} is of no usual pair ({usual}). Name both versions to run it anyway.")
    return found
