"""Writes plain data as TOML. Python reads TOML (``tomllib``), but does not write it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

_BARE = re.compile(r"[A-Za-z0-9_-]+")


def toml_text(data: Mapping[str, Any]) -> str:
    """Return data as TOML: first the plain values, then a table for each dict, and an array of tables for each list of dicts."""
    # They come first, because what follows the header of a table belongs to the table.
    plain = {key: value for key, value in data.items() if not isinstance(value, Mapping) and not _tables(value)}
    parts = ["".join(_lines(plain))]
    for key, value in data.items():
        if isinstance(value, Mapping):
            parts.append(f"[{_key(key)}]\n{''.join(_lines(value))}")
        elif _tables(value):
            parts += [f"[[{_key(key)}]]\n{''.join(_lines(table))}" for table in value]
    return "\n".join(part for part in parts if part)


def _tables(value: Any) -> bool:
    return _is_list(value) and bool(value) and all(isinstance(item, Mapping) for item in value)


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _lines(table: Mapping[str, Any]) -> list[str]:
    return [f"{_key(key)} = {_value(value)}\n" for key, value in table.items()]


def _key(key: str) -> str:
    return key if _BARE.fullmatch(key) else _text(key)


def _value(value: Any) -> str:
    if isinstance(value, bool):
        # Before the numbers: a bool is an int, too, and its ``repr`` is no TOML.
        return "true" if value else "false"
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_key(key)} = {_value(item)}" for key, item in value.items()) + "}"
    return f"[{', '.join(map(_value, value))}]" if _is_list(value) else repr(value)


def _text(text: str) -> str:
    """Return a text as a basic string of TOML. JSON escapes the same characters in the same way, except for DEL."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007F")
