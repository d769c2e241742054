"""The structures of arguments for which a rewritten module's graph is right, and the text that a call's structure is.

A structure is: the values that the forward's parameters get, defaults included; of a container its type and its items; of a tensor its
class; which tensors are one object; of anything else its contents (``contents_of``). dtypes count only for a graph of torch.export,
which fixes them (and asserts the numbers of dims); torch.fx asserts in the graph what the forward asked about them. A number that is an
input of the graph counts by its type.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from graphreg.errors import shown
from graphreg.ir.contents import TensorKind, contents_of, copied_contents, shown_contents

_ABSENT = inspect.Parameter.empty
_NUMBERS = (int, float)


@dataclass
class CallStructures:
    """The structures that a rewritten module accepts.

    Attributes:
        given: The arguments of a call of each accepted structure, by the name of the parameter, with a ``TensorKind`` for each tensor.
        inputs: The names of the parameters that are inputs of the graph; the others are specialized.
        loose: Whether dtypes and the values of numbers among the inputs do not count.
        digest: The digest of the trace from which the module was made (``digest``). A trace for another structure must have the same.
        front_end: The front end that made the trace.
        proves: Whether the graph is proved on the arguments of a call of another structure, before that is accepted.
        defaults: The model's own defaults of specialized arguments that the example inputs carry, by name.
        assumed: Whether no example inputs were given, so that each required argument was assumed to be a tensor.
        accepted: The texts of the accepted structures.
        refused: The messages for structures that were traced on the side and refused, by text.
        quick: Short descriptions of calls whose structures are accepted, see ``quick_key``.
    """

    given: list[dict[str, Any]]
    inputs: frozenset[str]
    loose: bool
    digest: str
    front_end: str
    proves: bool = True
    defaults: Mapping[str, Any] = field(default_factory=dict)
    assumed: bool = False
    accepted: dict[str, bool] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    quick: set[Any] = field(default_factory=set)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "accepted": {}, "refused": {}, "quick": set()}  # texts contain ids, which mean nothing elsewhere


class CallText:
    """Writes the structure of a call as a text. The method ``text`` uses only simple Python, because Dynamo traces it."""

    def __init__(self, forward: Callable[..., Any], specialized: Mapping[str, Any], structures: CallStructures) -> None:
        """Prepare the texts of one module.

        Args:
            forward: The emitted forward.
            specialized: The specialized arguments by name, with their values.
            structures: The structures that the module accepts. Their texts are written into it.
        """
        code = forward.__code__
        parameters = inspect.signature(forward).parameters
        # without ``self``
        self.names = tuple(code.co_varnames[1 : code.co_argcount])
        self.rest = next((p.name for p in parameters.values() if p.kind is p.VAR_POSITIONAL), None)
        self.named = next((p.name for p in parameters.values() if p.kind is p.VAR_KEYWORD), None)
        self.defaults = {name: parameters[name].default for name in self.names if parameters[name].default is not _ABSENT}
        self.defaults.update({name: value for name, value in specialized.items() if name in self.names})
        self.defaults.update(structures.defaults)
        self.inputs, self.loose = structures.inputs, structures.loose
        # a number that *args or **kwargs takes is no input of the graph, and counts by its value
        self._level, self._level_of_more = (3, 2) if structures.loose else (1, 1)
        # a specialized argument that a call leaves out always has the same text
        fixed = {name: value for name, value in self.defaults.items() if name not in self.inputs}
        self.fixed = {name: f"{name}={contents_of(value, (), False)}" for name, value in fixed.items()}

        texts = list[str]()
        for given in structures.given:
            args = [given.get(name, self.defaults.get(name)) for name in self.names]
            texts.append(self.text((*args, *given.get(str(self.rest), ())), dict(given.get(str(self.named), {}))))
        structures.accepted.update(dict.fromkeys(texts, True))
        self.first = texts[0]

    def text(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
        """Return the text of a call's structure."""
        seen: Any = [] if torch.compiler.is_dynamo_compiling() else {}
        parts = []
        for i, name in enumerate(self.names):
            if i >= len(args) and name not in kwargs and name in self.fixed:
                parts.append(self.fixed[name])
                continue
            value = args[i] if i < len(args) else kwargs[name] if name in kwargs else self.defaults.get(name, _ABSENT)
            if value is not _ABSENT:
                parts.append(f"{name}={contents_of(value, (), name in self.inputs, seen, self._level if name in self.inputs else 0)}")
        for i in range(len(self.names), len(args)):
            parts.append(f"*{i}={contents_of(args[i], (), True, seen, self._level_of_more)}")
        for name, value in kwargs.items():
            if name not in self.names:
                parts.append(f"{name}={contents_of(value, (), True, seen, self._level_of_more)}")
        return ", ".join(parts)

    def quick_key(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Return a short description of a call, which says all of its structure if ``is_quick`` is True."""
        key: list[Any] = []
        ids: list[int] = []
        self._describe(args, key, ids)
        if kwargs:
            key.extend(kwargs)
            self._describe(kwargs.values(), key, ids)
        # ``model(x, x)`` and ``model(x, y)`` are two structures: a forward may ask ``q is k``
        if len(ids) > 1:
            key.append(len(set(ids)))
        return tuple(key)

    def _describe(self, values: Iterable[Any], key: list[Any], ids: list[int]) -> None:
        for value in values:
            kind = type(value)
            key.append(kind)
            if kind is Tensor or kind is nn.Parameter:
                ids.append(id(value))
                if not self.loose:
                    key.append(value.dtype)
            elif kind is dict:
                key.append(tuple(value))
                self._describe(value.values(), key, ids)
            elif kind is list or kind is tuple:
                key.append(len(value))
                self._describe(value, key, ids)

    def is_quick(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        """Return whether all calls with this ``quick_key`` have one structure.

        So it is if the arguments, and the items of lists, tuples and dicts, are None, tensors of which none is there twice, and numbers
        that count by their type.
        """
        if len(args) > len(self.names):
            return False
        seen: set[int] = set()
        values = self.by_name(args, kwargs)
        # a specialized argument counts by its contents, which the key does not have
        if any(value is not None and name in self.names and name not in self.inputs for name, value in values.items()):
            return False
        return all(self._is_quick(value, self.loose and name in self.inputs, seen) for name, value in values.items())

    def _is_quick(self, value: Any, loose: bool, seen: set[int]) -> bool:
        kind = type(value)
        if kind is Tensor or kind is nn.Parameter:
            # False if the tensor was there before: the key says that two are one, and not which
            count = len(seen)
            seen.add(id(value))
            return len(seen) > count
        if kind is dict:
            return all(type(key) is str and self._is_quick(item, loose, seen) for key, item in value.items())
        if kind is list or kind is tuple:
            return all(self._is_quick(item, loose, seen) for item in value)
        return value is None or (loose and kind in _NUMBERS)

    def by_name(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments of a call by the names of the parameters, without those that ``*args`` takes."""
        return {**dict(zip(self.names, args, strict=False)), **kwargs}

    def kept(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Return a call's arguments by the names of the parameters, as in ``CallStructures.given``."""
        copies: dict[int, Any] = {}
        values = {**self.defaults, **self.by_name(args, kwargs)}
        more = {name: values.pop(name) for name in kwargs if name not in self.names}
        if self.rest is not None:
            values[self.rest] = tuple(args[len(self.names) :])
        if self.named is not None:
            values[self.named] = more
        return {name: copied_contents(value, copies, is_data=True) for name, value in values.items()}

    def shown(self, given: Mapping[str, Any], also: Sequence[str] = ()) -> str:
        """Return a structure as messages show it, without specialized arguments, unless ``also`` names them."""
        numbers: dict[int, int] = {}
        parts = []
        for name in (*self.names, *(each for each in (self.rest, self.named) if given.get(str(each)))):
            if name not in given:
                continue
            value = given[str(name)]
            if name in self.inputs or name in also or name not in self.defaults:
                loose = self.loose and (name in self.inputs or name not in self.defaults)
                parts.append(f"{name}={_shown(value, loose, numbers, name in (self.rest, self.named))}")
        return f"({', '.join(parts)})"


def _shown(value: Any, loose: bool, numbers: dict[int, int], exact: bool) -> str:
    """``exact``: whether numbers are shown all the same."""
    if isinstance(value, TensorKind):
        if id(value) in numbers:
            return "the same tensor again"
        numbers[id(value)] = len(numbers)
        kind = "a tensor" if value.kind is Tensor else f"a {value.kind.__name__}"
        return kind if loose else f"{kind} of {value.dtype}".replace("torch.", "")
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key!r}: {_shown(item, loose, numbers, exact)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        ends = "[]" if isinstance(value, list) else "()"
        kind = "" if type(value) in (list, tuple) else type(value).__name__
        return f"{kind}{ends[0]}{', '.join(_shown(item, loose, numbers, exact) for item in value)}{ends[1]}"
    if loose and not exact and type(value) in _NUMBERS:
        return type(value).__name__
    return shown_contents(value) if value is not None else shown(value)
