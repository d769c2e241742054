"""Helpers for the options of a regularizer: the mark of an option that must be given, and checks of the options that a user gives."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import fields
from enum import Enum
from typing import Any

from graphreg.errors import RegularizerError, shown, suggestions_text

STRENGTH = "strength"


class NotGiven(Enum):
    """The mark for an option that the user has not given."""

    OPTION = "not given"


def required() -> Any:
    """Return the default that marks an option as not given.

    The class's ``check`` must call ``require_number``, which raises if the option still has the
    mark. For an option that is annotated ``ModelInput``, graphreg raises. The return type is Any,
    so that a field of any type can have this default.
    """
    return NotGiven.OPTION


def option_names(cls: Any) -> list[str]:
    """Return the names that the options of a class may be given by."""
    return list(dict.fromkeys([*(field.name for field in fields(cls)), *strength_names(cls)]))


def strength_names(cls: Any) -> tuple[str, ...]:
    """Return the names of the option for the strength: ``weight``, which is the field, and ``strength``.

    A class that has an option ``strength`` of its own keeps it.
    """
    return ("weight",) if any(field.name == STRENGTH for field in fields(cls)) else ("weight", STRENGTH)


def taking_strength(init: Callable[..., None]) -> Callable[..., None]:
    """Wrap the ``__init__`` of a dataclass of regularizers, so that it takes ``strength`` for the field ``weight``."""

    @functools.wraps(init)
    def __init__(self: Any, *args: Any, **options: Any) -> None:
        if STRENGTH in options:
            options["weight"] = options.pop(STRENGTH)
            object.__setattr__(self, "strength_option", STRENGTH)  # so that errors name what the user wrote
        init(self, *args, **options)

    return __init__


def check_option_names(cls: Any, args: tuple[Any, ...], options: Mapping[str, Any]) -> None:
    """Raise RegularizerError unless a class has all ``options``, given by name, and at most two were given by position."""
    names = option_names(cls)
    unknown = [name for name in options if name not in names]
    if unknown:
        raise RegularizerError(
            f"{cls.__name__} has no option {unknown[0]!r}.{suggestions_text(unknown[0], names, 'Near options')} "
            f"Options: {', '.join(names)}."
        )
    if len(args) > 2:
        raise RegularizerError(f"{cls.__name__} takes a selector and a weight by position; write the rest by name.")
    if STRENGTH in options and STRENGTH in strength_names(cls) and ("weight" in options or len(args) == 2):
        weight = options.get("weight", args[-1] if args else None)
        raise RegularizerError(
            f"{cls.__name__}: strength={shown(options[STRENGTH])} and weight={shown(weight)} are two names of one option. Give one of them."
        )
