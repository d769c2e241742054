"""Helpers for the options of a regularizer: the mark of an option that must be given, and checks of the options that a user gives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from enum import Enum
from typing import Any

from graphreg.errors import RegularizerError, suggestions_text


class NotGiven(Enum):
    """The mark for an option that the user has not given."""

    OPTION = "not given"


def required() -> Any:
    """Return the default that marks an option as not given.

    The class's ``check`` must call ``require_number``, which raises if the option still has the
    mark. For an option that is annotated ``ModelInput``, the engine raises. The return type is Any,
    so that a field of any type can have this default.
    """
    return NotGiven.OPTION


def check_names(cls: Any, args: tuple[Any, ...], options: Mapping[str, Any]) -> None:
    """Raise RegularizerError unless a class has all ``options``, given by name, and at most two were given by position."""
    names = [field.name for field in fields(cls)]
    unknown = [name for name in options if name not in names]
    if unknown:
        raise RegularizerError(
            f"{cls.__name__} has no option {unknown[0]!r}.{suggestions_text(unknown[0], names, 'Near options')} "
            f"Options: {', '.join(names)}."
        )
    if len(args) > 2:
        raise RegularizerError(f"{cls.__name__} takes a selector and a weight by position; write the rest by name.")
