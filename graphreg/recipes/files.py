"""Reads and writes the files of recipes: JSON, TOML or YAML, by the suffix."""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from graphreg.errors import GraphRegError, NoMatchError, RegularizerError, shown
from graphreg.recipes.lines import KeyPath, line_of
from graphreg.recipes.toml_text import toml_text

SUFFIXES = ".json, .toml, .yaml or .yml"


@dataclass(frozen=True)
class RecipeFile:
    """The data of a recipe, and the file that it was read from, for errors.

    Attributes:
        data: The data.
        path: The file; None if the recipe was not read from a file.
        text: The text of the file.
    """

    data: Any
    path: Path | None = None
    text: str = ""

    def where(self, place: KeyPath) -> str:
        """Describe a place in the recipe: the file, the line, and the keys that lead there."""
        keys = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in place).removeprefix(".")
        if self.path is None:
            return f"the recipe, at {keys}" if keys else "the recipe"
        line = line_of(self.text, self.data, place)
        return f"{self.path}" + f", line {line}" * (line is not None) + f", at {keys}" * bool(keys)

    def error(self, place: KeyPath, message: str, kind: type[GraphRegError] = RegularizerError) -> GraphRegError:
        """Return an error about a place in the recipe."""
        return kind(f"{self.where(place)}: {message}")

    def at(self, place: KeyPath, error: GraphRegError) -> GraphRegError:
        """Return ``error`` with a message that begins with the place in the recipe."""
        kind = NoMatchError if isinstance(error, NoMatchError) else RegularizerError
        return self.error(place, str(error), kind)


def read(path: str | os.PathLike[str]) -> RecipeFile:
    """Read a recipe's file.

    Raises:
        RegularizerError: The suffix is unknown, or the file does not exist or is malformed.
        GraphRegError: The file is YAML, and PyYAML is not installed.
    """
    file, parse = Path(path), _of_suffix(path)[0]
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise RegularizerError(f"the recipe {file} cannot be read: {error}.") from None
    return RecipeFile(parse(text, file), file, text)


def write(path: str | os.PathLike[str], data: Mapping[str, Any]) -> None:
    """Write a recipe's file; an existing file is replaced."""
    text = _of_suffix(path)[1](data)
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise RegularizerError(f"the recipe {path} cannot be written: {error}.") from None


def _of_suffix(path: Any) -> tuple[Callable[[str, Path], Any], Callable[[Mapping[str, Any]], str]]:
    """Return two functions for the format that a path's suffix names: one parses a file's text, the other makes the text from data."""
    formats: dict[str, tuple[Callable[[str, Path], Any], Callable[[Mapping[str, Any]], str]]] = {
        ".json": (_parse_json, lambda data: json.dumps(data, indent=2, ensure_ascii=False) + "\n"),
        ".toml": (_parse_toml, toml_text),
        ".yaml": (_parse_yaml, _yaml_text),
        ".yml": (_parse_yaml, _yaml_text),
    }
    if not isinstance(path, (str, os.PathLike)):
        raise RegularizerError(f"{shown(path)} is no path of a recipe; give a file with the suffix {SUFFIXES}.")
    suffix = Path(path).suffix.lower()
    if suffix not in formats:
        raise RegularizerError(f"the recipe {os.fspath(path)} has the suffix {suffix!r}; a recipe's file has {SUFFIXES}.")
    return formats[suffix]


def of_json(text: str) -> Any:
    """Return the data of a JSON text. Raises ValueError if it is malformed, has a key twice in one object, or NaN or Infinity."""
    return json.loads(text, object_pairs_hook=_without_repeats, parse_constant=_no_constant)


def _parse_json(text: str, file: Path) -> Any:
    try:
        return of_json(text)
    except json.JSONDecodeError as error:
        raise RegularizerError(f"{file}, line {error.lineno}: this is not JSON ({error.msg}).") from None
    except ValueError as error:  # from _without_repeats or _no_constant
        raise RegularizerError(f"{file}: {error}") from None


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    # Of two equal keys, ``json`` would take the last one without an error.
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} is given twice in one object.")
    return found


def _no_constant(text: str) -> Any:
    # ``json`` reads NaN and Infinity, which JSON itself does not have.
    raise ValueError(f"{text} is no number that a recipe can have.")


def _parse_toml(text: str, file: Path) -> Any:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RegularizerError(f"{file}: this is not TOML ({error}).") from None


def _yaml() -> ModuleType:
    try:
        import yaml  # noqa: PLC0415 - the one use of an optional extra
    except ImportError:
        raise GraphRegError("recipes in YAML need PyYAML: pip install 'graphreg[yaml]', or write the recipe as JSON or TOML.") from None
    module: ModuleType = yaml
    return module


def _parse_yaml(text: str, file: Path) -> Any:
    yaml = _yaml()
    loader = yaml.SafeLoader(text)
    # As in YAML 1.2, only true and false are truth values: ``off`` is the name of a choice.
    resolvers: dict[str, list[tuple[str, Any]]] = loader.yaml_implicit_resolvers
    loader.yaml_implicit_resolvers = {
        first: [each for each in known if first in "tTfF" or not each[0].endswith(":bool")] for first, known in resolvers.items()
    }
    try:
        node = loader.get_single_node()
        _require_single_keys(node, file)
        return None if node is None else loader.construct_document(node)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{file}, line {mark.line + 1}" if mark is not None else str(file)
        raise RegularizerError(f"{where}: this is not YAML ({getattr(error, 'problem', None) or error}).") from None


def _require_single_keys(node: Any, file: Path) -> None:
    """Raise RegularizerError if a mapping in a YAML document has a key twice. PyYAML would take the last one without an error."""
    seen, waiting = set[int](), [] if node is None else [node]
    while waiting:
        each = waiting.pop()
        if id(each) in seen or each.id == "scalar":
            continue
        seen.add(id(each))
        pairs = each.value if each.id == "mapping" else []
        names = [key.value for key, _ in pairs]
        for i, (key, _) in enumerate(pairs):
            if key.value in names[:i]:
                raise RegularizerError(f"{file}, line {key.start_mark.line + 1}: the key {key.value!r} is given twice in one mapping.")
        waiting += [value for _, value in pairs] or (each.value if each.id == "sequence" else [])


def _yaml_text(data: Mapping[str, Any]) -> str:
    return str(_yaml().safe_dump(dict(data), sort_keys=False, allow_unicode=True))
