"""What a selector finds, by the rules of docs/selectors.md, written anew: ``[!]name[@op][:port][#role]``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase


@dataclass(frozen=True)
class Name:
    """One way to call a place: ``module`` is the path of the module whose value it is, if it is one's."""

    name: str
    op: str
    ports: tuple[str, ...] = ("out",)
    default: bool = True
    module: str | None = None

    @property
    def text(self) -> str:
        return self.name if self.default else f"{self.name}:{self.ports[0]}"


@dataclass
class Place:
    """A value or parameter, as the generator knows it. ``unsure``: whether it counts as used depends on writes. ``usable``: whether a
    regularizer can act on it; ``trains``: whether a parameter reaches it; ``written``: whether
    something writes into its storage later."""

    names: list[Name]
    kind: str = "value"
    role: str = ""
    norm: bool = False
    used: bool = True
    unsure: bool = False
    dims: int = 2
    usable: bool = True
    trains: bool = False
    written: bool = False

    @property
    def name(self) -> str:
        return self.names[0].text


def parse(text: str) -> tuple[bool, str, str | None, str | None, str | None]:
    """Whether it excludes, and its name, op, port and role."""
    away, rest = text.startswith("!"), text.removeprefix("!")
    rest, _, role = rest.partition("#")
    rest, _, port = rest.partition(":")
    name, _, op = rest.partition("@")
    return away, name or "**", op or None, port or None, role or None


def matches(text: str, places: Iterable[Place]) -> list[Place]:
    """The places that a string finds."""
    _, name, op, port, role = parse(text)
    named = [
        (each, place)
        for place in places
        for each in place.names
        if (op is None or fnmatchcase(each.op, op)) and role in (None, place.role) and fnmatchcase(each.name, name)
    ]
    closed = {each.module for each, place in named if each.module is not None and place.kind == "value"} if "**" not in name else set()
    found: list[Place] = []
    for each, place in named:
        if place.kind == "value":
            right_port = each.default if port is None else any(fnmatchcase(p, port) for p in each.ports)
            parents = each.name.split(".")
            inside = any(".".join(parents[:i]) in closed for i in range(1, len(parents)))
            if not right_port or inside:
                continue
        if not any(place is other for other in found):
            found.append(place)
    return found


def select(
    texts: Sequence[str], places: Sequence[Place], usual: Sequence[Place], elsewhere: Sequence[Place] = ()
) -> tuple[list[Place], list[str]]:
    """The places that several strings find together, in order, and the strings that find none that is usable.

    An exclusion may take away what is not there for this regularizer, but not what is nowhere: ``elsewhere`` are the other places.
    """
    wanted: list[Place] = list(usual) if all(text.startswith("!") for text in texts) else []
    gone: list[Place] = []
    empty = []
    for text in texts:
        named = list(usual) if text.lstrip("!") == "*" else matches(text, places)
        found = [place for place in named if place.usable]
        away = text.startswith("!") and (named or matches(text.lstrip("!"), elsewhere))
        if not found and not away:
            empty.append(text)
        (gone if text.startswith("!") else wanted).extend(found)
    chosen = [p for p in places if any(p is w for w in wanted) and not any(p is g for g in gone)]
    if wanted and not chosen:
        empty.append("everything is taken away again")
    return chosen, empty
