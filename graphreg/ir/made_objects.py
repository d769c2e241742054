"""Objects that a model makes and returns, such as a cache of transformers: a graph makes them anew from what their attributes hold.

What pickle and copy do with an object of a plain class is the rule: they make one without calling
``__init__``, and fill its ``__dict__``.
"""

from __future__ import annotations

import copyreg
import functools
from collections.abc import Callable, Collection
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import nn

Template = tuple[Any, ...]
_PLAIN = (bool, int, float, complex, str, bytes, type(None), type, torch.dtype, torch.device, torch.layout, torch.memory_format)
# methods by which a class says itself how an object is made, and what its attributes are
_OWN = ("__reduce__", "__reduce_ex__", "__getstate__", "__setstate__", "__new__", "__setattr__", "__getattribute__")
_known: dict[Template, MadeObject] = {}


class MadeObject:
    """A function that makes an object from the values that its attributes hold. Two that make the same are one object.

    Attributes:
        template: What to make: nested tuples, each with its kind first.
    """

    def __init__(self, template: Template) -> None:
        self.template = template
        # torch.fx writes it into the code
        self.__name__ = self.__qualname__ = f"made_{template[2].__name__}"

    def __call__(self, *values: Any) -> Any:
        return _make(self.template, values, {})

    def __reduce__(self) -> tuple[Any, ...]:
        return made_object, (self.template,)

    def __repr__(self) -> str:
        return self.__name__


def made_object(template: Template) -> MadeObject:
    """Return the function for a template."""
    return _known.setdefault(template, MadeObject(template))


def making(value: object, is_traced: Callable[[object], bool], held: Collection[int]) -> tuple[MadeObject, list[Any]] | None:
    """Return the function that makes an object, and its arguments; None if no function can.

    Args:
        value: The object. Something in it must be traced.
        is_traced: Whether something is a value that a graph computes.
        held: The ids of objects that were there before the forward, which returns these objects
            themselves.
    """
    found = _TemplateWriter(is_traced, held)
    try:
        template = found.template(value)
    except _NotMade:
        return None
    return (made_object(template), found.values) if template[0] == "object" and found.values else None


class _NotMade(Exception):
    """Something is no traced value, no plain data, and no object of a plain class."""


class _TemplateWriter:
    """Goes through an object, and writes its template."""

    def __init__(self, is_traced: Callable[[object], bool], held: Collection[int]) -> None:
        self.is_traced, self.held = is_traced, held
        self.values: list[Any] = []
        # of each list, dict and object, by its id, in the order in which they are met
        self.numbers: dict[int, int] = {}

    def template(self, value: Any) -> Template:
        kind = type(value)
        if self.is_traced(value):
            self.values.append(value)
            return "value", len(self.values) - 1

        if kind in (tuple, torch.Size):
            return "tuple", kind, tuple(map(self.template, value))
        if kind in _PLAIN or isinstance(value, type):
            # by the text, 0.0 is not -0.0, and by the class, 1 is not True
            return "plain", kind, repr(value), value

        if id(value) in self.numbers:
            return "again", self.numbers[id(value)]
        if id(value) in self.held:
            raise _NotMade

        number = self.numbers[id(value)] = len(self.numbers)
        if kind is list:
            return "list", number, tuple(map(self.template, value))
        if kind is dict and all(type(key) in _PLAIN for key in value):
            return "dict", number, tuple((key, self.template(item)) for key, item in value.items())
        if not is_plain_class(kind):
            raise _NotMade
        return "object", number, kind, tuple((name, self.template(item)) for name, item in vars(value).items())


def is_record(value: object) -> bool:
    """Return whether a value is an object of a dataclass that its fields alone make, which torch.fx makes itself."""
    if not is_dataclass(value) or isinstance(value, type):
        return False
    return all(field.init for field in fields(value)) and vars(value).keys() == {field.name for field in fields(value)}


class _Empty:
    """A class whose objects hold nothing outside of their ``__dict__``."""


def is_plain_class(kind: type) -> bool:
    """Return whether all that an object of a class holds is in its ``__dict__``, and assigning its attributes makes another one."""
    ours = all(getattr(kind, name, None) is getattr(object, name, None) for name in _OWN)
    return ours and kind not in copyreg.dispatch_table and _sizes(kind) == _sizes(_Empty)


def _sizes(kind: type) -> tuple[int, int, int]:
    """Return how much memory an object of a class takes, and where in it the ``__dict__`` is. Slots and fields of C take more."""
    return kind.__basicsize__, kind.__itemsize__, kind.__dictoffset__


def _make(part: Template, values: tuple[Any, ...], made: dict[int, Any]) -> Any:
    kind = part[0]
    if kind == "value":
        return values[part[1]]
    if kind == "plain":
        return part[3]
    if kind == "again":
        return made[part[1]]

    if kind == "tuple":
        return part[1]([_make(item, values, made) for item in part[2]])

    # A list, a dict or an object is known before its items are made, because they may hold it again.
    if kind == "list":
        items: list[Any] = []
        made[part[1]] = items
        for item in part[2]:
            items.append(_make(item, values, made))
        return items
    if kind == "dict":
        entries: dict[Any, Any] = {}
        made[part[1]] = entries
        for key, item in part[2]:
            entries[key] = _make(item, values, made)
        return entries

    value = object.__new__(part[2])
    made[part[1]] = value
    for name, item in part[3]:
        setattr(value, name, _make(item, values, made))
    return value


def held_objects(*values: Any) -> dict[int, Any]:
    """Return the lists, dicts and objects of plain classes in values, and in the attributes of modules among them, by their ids."""
    seen, waiting = dict[int, Any](), [*values]
    is_plain: Any = functools.cache(is_plain_class)  # the values have few classes
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        if isinstance(value, (list, tuple, dict)):
            waiting.extend(value.values() if isinstance(value, dict) else value)
        elif isinstance(value, nn.Module) or is_plain(type(value)):
            waiting.extend(vars(value).values())
        else:
            continue
        seen[id(value)] = value
    return seen
