"""Who reads a parameter, and at which reads a splice on it acts, by the rules of docs/parameters.md, written anew."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from fuzz.matching import Name, Place, parse

Chain = list[tuple[str, str, int]]  # the splices at a read, in order: the regularizer, the site, its number among those of its class


def readers(kind: str, pattern: Sequence[str], place: Place) -> list[Name]:
    """The names of a parameter whose modules read what the splice gives; a tied parameter has several."""
    names = [name for name in place.names if kind != "EmbeddingDropout" or name.op == "Embedding"]
    found: list[Name] = []
    wanted = [text for text in pattern if not text.startswith("!")]
    for text in wanted or ["*"]:
        _, name, op, _, _ = parse(text)
        matched = [each for each in names if fnmatchcase(each.name, name) and (op is None or fnmatchcase(each.op, op))]
        if text == "*" or (matched and "**" in name and op is None):
            return names
        found += [each for each in matched if each not in found]
    return found or names


def chains(
    kinds: Sequence[str], patterns: Sequence[Sequence[str]], names: Sequence[str], sites: Sequence[Sequence[str]], places: Sequence[Place]
) -> dict[str, dict[str, Chain]]:  # fmt: skip
    """By a module's path and a parameter's name in it, the splices at its read. Each argument but the last has one entry a regularizer."""
    known, count = {place.name: place for place in places}, dict[tuple[str, str], int]()
    by_read: dict[str, dict[str, Chain]] = {}
    for kind, pattern, name, found in zip(kinds, patterns, names, sites, strict=True):
        for site in found if kind in ("WeightNoise", "DropConnect", "EmbeddingDropout") else ():
            at = count.get((site, kind), 0)
            count[site, kind] = at + 1
            for reader in readers(kind, pattern, known[site]):
                path, _, own = reader.name.rpartition(".")
                by_read.setdefault(path, {}).setdefault(own, []).append((name, site, at))
    return by_read
