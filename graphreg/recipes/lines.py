"""Finds the line of a recipe's file that an error is about.

The parsers of JSON and TOML say where a file is malformed, but not where a value stands. The data
keeps the order of the file, so the n-th key of some name in the data is the n-th key of that name
in the text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from operator import getitem
from typing import Any

KeyPath = tuple[str | int, ...]  # the keys and indices that lead to a value


def line_of(text: str, data: Any, place: KeyPath) -> int | None:
    """Return the number of the line, from 1, on which the last key of ``place`` stands in the text; None if the line cannot be found."""
    while place and not isinstance(place[-1], str):
        found = reduce(getitem, place, data)
        # of a list's entry, the first key
        place = (*place, next(iter(found))) if isinstance(found, Mapping) and found else place[:-1]
    if not place:
        return None
    key = str(place[-1])
    before = [found for found in _places(data) if found[-1] == key]
    matches = list(_keys(text, key))
    # the counts differ, for example, if a quoted text looks like a key
    if place not in before or len(matches) != len(before):
        return None
    return text.count("\n", 0, matches[before.index(place)]) + 1


def _places(data: Any, place: KeyPath = ()) -> Iterator[KeyPath]:
    """Yield the place of each key, in the order of the text."""
    if isinstance(data, Mapping):
        for key, value in data.items():
            yield (*place, key)
            yield from _places(value, (*place, key))
    elif isinstance(data, Sequence) and not isinstance(data, str):
        for i, value in enumerate(data):
            yield from _places(value, (*place, i))


def _keys(text: str, key: str) -> Iterator[int]:
    """Yield the position of each place in the text where ``key`` stands as a key, as JSON, TOML or YAML write it."""
    word = re.escape(key)
    # The key in quotes of either kind, or bare: no part of a longer word or dotted name.
    quoted = rf"\"{word}\"|'{word}'|(?<![\w\"'.-]){word}(?![\w\"'.-])"
    for match in re.finditer(rf"(?:{quoted})\s*[:=]|\[(?:{quoted})\]", text):
        # A comment of TOML or YAML may have a line that looks like a key.
        if not re.match(r"\s*#", text[text.rfind("\n", 0, match.start()) + 1 :]):
            yield match.start()
