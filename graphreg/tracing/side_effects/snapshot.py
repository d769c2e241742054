"""What a forward changes beside its values: attributes, variables, lists, arrays, counters, default arguments; and putting that back.

A trace runs the forward, and a graph does none of this. What the forward leaves behind for its next call is kept for a moment, to
see whether a second trace comes out otherwise: then the graph would be wrong from its second call on.
"""

from __future__ import annotations

import array
import functools
import inspect
import queue
import sys
import threading
import types
from collections import deque
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

from graphreg.tracing.side_effects.iterators import Bytes, Context, Steps, Stream, can_be_copied, is_iterator, is_stream
from graphreg.tracing.side_effects.places import PLAIN, REGISTERED, Attributes, Cells, Container, Gone, Items, Memory, Place, Slots, Variables
from graphreg.tracing.side_effects.reach import Reach, others, reached

_OBJECTS = (types.SimpleNamespace, threading.local, queue.Queue)  # Python's own that hold what they are given
_FOLDED = (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, types.MethodType, nn.Parameter)


class Before:
    """A model before its forward runs: its attributes, what is in their containers, in its classes and in default arguments, and what
    its code reaches beside that."""

    def __init__(self, model: nn.Module) -> None:
        self.places: list[Place] = []
        self.one_way: dict[str, str] = {}  # what nobody can put back, by name: the key that code has it by
        self._seen: set[int] = set()
        self._paths = [f"self.{path}" if path else "self" for path, _ in model.named_modules()]
        self._registered = [(m, {name: dict(m.__dict__[name]) for name in REGISTERED}) for m in model.modules()]
        kinds: dict[type, None] = {}
        for path, module in model.named_modules():
            self._attributes(Attributes(module, f"self.{path}" if path else "self"), 2)
            kinds |= {kind: None for kind in type(module).__mro__ if not others(kind)}
        self.reach = reached(model.modules())
        for kind in {**kinds, **self.reach.classes}:
            self._class(kind)
        self._outside(self.reach)

    def _outside(self, reach: Reach) -> None:
        for space, names in reach.variables.values():
            self._attributes(Variables(space, frozenset(names)), 2)
            if any(_is_numpys(space[name]) for name in names):
                self._look(sys.modules["numpy"].random.mtrand._rand, "numpy.random", 0)
        for function in reach.functions.values():
            self._defaults(function, f"{function.__module__}.{function.__qualname__}")
            self._attributes(Attributes(function, function.__qualname__), 1)
            if function.__closure__:
                self._attributes(Cells(function), 2)

    def _attributes(self, place: Attributes, depth: int) -> None:
        """``depth``: how many objects within one another are looked into."""
        self._seen.add(id(place.owner))
        self.places.append(place)
        for key, value in place.content.items():
            self._look(value, place.label(key), depth, place, key)

    def _class(self, kind: type) -> None:
        if id(kind) in self._seen:
            return
        self._seen.add(id(kind))
        self.places.append(place := Attributes(kind, kind.__name__))
        for name, value in place.content.items():
            function = inspect.unwrap(value) if callable(value) else value
            if isinstance(function, types.FunctionType):
                self._defaults(function, f"{kind.__name__}.{name}")
            elif not isinstance(value, type):
                self._look(value, f"{kind.__name__}.{name}", 0, place, name)

    def _defaults(self, function: types.FunctionType, name: str) -> None:
        for default in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
            self._look(default, f"a default argument of {name}", 0)

    def _look(self, value: Any, name: str, depth: int, holder: Attributes | None = None, key: str = "") -> None:
        if isinstance(value, types.MethodType):
            self._look(value.__self__, name, depth)
        elif isinstance(value, functools.partial):
            self._look(value.args, name, depth)
            self._look(value.keywords, name, depth)
        if type(value) is Gone or isinstance(value, PLAIN) or id(value) in self._seen or isinstance(value, _FOLDED):
            return
        self._seen.add(id(value))
        if isinstance(value, (list, dict, set, deque)):
            self.places.append(Items(value, name) if isinstance(value, dict) else Container(value, name))
        if isinstance(value, (list, tuple, dict, deque)):
            for item in list(dict.values(value) if isinstance(value, dict) else value):
                self._look(item, name, depth)
        elif type(value) is torch.Tensor or (type(value).__module__ == "numpy" and hasattr(value, "tobytes") and hasattr(value, "flags")):
            self.places.append(Memory(value, name))
        elif isinstance(value, (bytearray, array.array)):
            self.places.append(Bytes(value, name))
        elif isinstance(value, ContextVar) and value.get(None) is not None:  # what was never set cannot be unset
            self.places.append(Context(value, name))
        elif is_stream(value):
            self.places.append(Stream(value, name))
        elif is_iterator(value):
            if holder is not None and can_be_copied(value):
                self.places.append(Steps(value, name, holder, key))
            else:
                self.one_way[name] = key
        elif depth and (not others(type(value)) or isinstance(value, _OBJECTS)):
            self._object(value, name, depth - 1)

    def _object(self, value: Any, name: str, depth: int) -> None:
        if hasattr(value, "__dict__"):
            self._attributes(Attributes(value, name), depth)
        if any("__slots__" in vars(kind) for kind in type(value).__mro__ if not others(kind)):
            self._attributes(Slots(value, name), depth)

    def changed(self) -> list[str]:
        """The names of what holds other numbers, texts or items now, which a later call may read. What a later trace could not read,
        values of this one, is put back already."""
        self._put_back_registered()
        return list(dict.fromkeys(name for place in self.places for name in place.settle()))

    def registered(self) -> list[str]:
        """The names of the buffers, parameters and modules that the forward has registered, or put in the place of others."""
        return [
            f"{place}.{name}"
            for (module, registered), place in zip(self._registered, self._paths, strict=True)
            for kind, content in registered.items()
            for name in {**content, **module.__dict__[kind]}
            if module.__dict__[kind].get(name) is not content.get(name)
        ]

    def tables(self) -> list[str]:
        """The names of what the forward has assigned tensors of its own making to; asked after ``changed``."""
        return [place.label(key) for place in self.places if isinstance(place, Attributes) for key in place.tensors]

    def drawn(self) -> list[str]:
        """The names of generators of random numbers that have been drawn from."""
        return [name for place in self.places if isinstance(place, Stream) for name in place.settle()]

    def moved(self) -> list[str]:
        """The names of those attributes that another trace has assigned other numbers to."""
        return [name for place in self.places if isinstance(place, Attributes) for name in place.moved()]

    def counting(self) -> bool:
        """Whether a number has changed since ``changed`` was asked: it is a count then, and from now on tells who decides by it."""
        return any([place.count() for place in self.places if isinstance(place, Attributes)])  # noqa: C419  # of all of them

    def put_back(self) -> None:
        self._put_back_registered()
        for place in self.places:
            place.put_back()

    def _put_back_registered(self) -> None:
        for module, registered in self._registered:
            for name, content in registered.items():
                now = module.__dict__[name]  # the dict itself stays, others may hold it; compared by identity, for it may hold proxies
                if [(k, id(v)) for k, v in now.items()] != [(k, id(v)) for k, v in content.items()]:
                    now.clear()
                    now.update(content)


def _is_numpys(value: Any) -> bool:
    """Whether numpy's random numbers can be drawn by this."""
    named = value.__name__ if isinstance(value, types.ModuleType) else str(getattr(getattr(value, "__self__", None), "__module__", ""))
    return named == "numpy" or named.startswith("numpy.random")
