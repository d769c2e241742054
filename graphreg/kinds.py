"""What ``isinstance`` answers of a value that is being traced: what stands behind it, not that it is a proxy.

A proxy is of no type that a forward asks for, so that ``if isinstance(x, torch.Tensor)`` goes the wrong way without a word, in
torch.fx's own trace too (pytorch/pytorch#43971 proposed a flag for models to ask). ``__class__`` cannot answer "Tensor": torch's
argument parser believes it, and reads the proxy's memory as a tensor's. So the modules that the model's code stands in see another
``isinstance`` meanwhile, in their globals, as torch.fx has it with the functions that it wraps; and ``__class__``, which ``match`` and
code that was not found ask, refuses (``Value`` in proxies.py).
"""

from __future__ import annotations

import builtins
import functools
import sys
import types
import typing
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.fx.proxy import Attribute

from graphreg.changes import Changes
from graphreg.proxies import FOREIGN, Value
from graphreg.sure import ATTRIBUTES, is_tensor, surely

Globals = dict[str, Any]


def places_of(root: nn.Module) -> list[Globals]:
    """The globals of the model's code: of its classes, hooks and functions, and of what these import of the same packages."""
    return _reached(_code_of(root))


@contextmanager
def answered(places: Iterable[Globals]) -> Iterator[None]:
    """Meanwhile the model's code, which has these globals, asks ``isinstance`` here, and so does ``torch.is_tensor``."""
    changed = [place for place in (*places, vars(torch)) if "isinstance" not in place]
    with Changes() as changes, changes:
        for place in changed:
            changes.put(place, "isinstance", is_of)
        yield


def _code_of(root: nn.Module) -> Iterator[Any]:
    """The functions that run when the model does, and what may hold some: its classes, their bases, hooks, what is set on it."""
    seen: dict[type, None] = {}
    for module in root.modules():
        seen.update(dict.fromkeys(type(module).__mro__))
        yield from (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        yield from (value for value in vars(module).values() if callable(value))
    for kind in seen:
        yield from vars(kind).values()


def _reached(code: Iterable[Any]) -> list[Globals]:
    """The globals of functions, and of the modules and functions that stand in them and belong to the same package."""
    found: dict[int, Globals] = {}
    waiting = [place for thing in code if (place := _globals_of(thing)) is not None]
    imported = [place for own in waiting for thing in list(own.values()) if (place := _globals_of(thing)) is not None]
    packages = {_package(place) for place in (*waiting, *imported)}
    while waiting:
        place = waiting.pop()
        if id(place) in found:
            continue
        found[id(place)] = place
        held = [vars(v) if isinstance(v, types.ModuleType) else _globals_of(v) for v in list(place.values())]
        waiting += [h for h in held if h is not None and id(h) not in found and (_package(h) in packages or _is_file(h))]
    return list(found.values())


def _is_file(place: Globals) -> bool:
    """A module of no package, such as the files beside a script."""
    return "__path__" not in place and "." not in str(place.get("__name__", ".")) and _package(place) not in FOREIGN


def _globals_of(thing: Any) -> Globals | None:
    """Of a function inside partials, methods and decorators, or of a class by the module that defines it; None for others' code."""
    while isinstance(thing, (functools.partial, types.MethodType, staticmethod, classmethod, property)):
        thing = thing.func if isinstance(thing, functools.partial) else getattr(thing, "__func__", None) or getattr(thing, "fget", None)
    thing = getattr(thing, "__wrapped__", thing)
    if isinstance(thing, types.FunctionType):
        place: Globals | None = thing.__globals__
    else:
        home = sys.modules.get(thing.__module__) if isinstance(thing, type) else None
        place = vars(home) if isinstance(home, types.ModuleType) else None
    return place if place is not None and _package(place) not in FOREIGN else None


def _package(place: Globals) -> str:
    return str(place.get("__name__", "")).partition(".")[0]


def is_of(value: object, kinds: Any) -> bool:
    """``isinstance``, of a value of a trace too; TypeError where what stands behind it is not known."""
    if not issubclass(type(value), (Value, Attribute)):
        return builtins.isinstance(value, kinds)
    traced: Any = value
    if (
        issubclass(type(value), Attribute) and traced.attr in ATTRIBUTES and is_tensor(traced.root.node, traced.tracer)
    ):  # it gets no node by this
        return _is(ATTRIBUTES[traced.attr], kinds, traced.attr)
    kind = surely(traced.node, traced.tracer)
    if kind is None and (kind := traced.tracer.kind(traced.node)) is None:
        raise TypeError(f"isinstance is asked of {traced.node.name!r}, and the trace cannot tell what that is")
    return _is(kind, kinds, traced.node.name)


def _is(kind: type, kinds: Any, name: str) -> bool:
    if builtins.isinstance(kinds, tuple):
        return any(_is(kind, each, name) for each in kinds)
    if typing.get_origin(kinds) in (types.UnionType, typing.Union):
        return any(_is(kind, each, name) for each in typing.get_args(kinds))
    plain = kinds is None or kinds is nn.Parameter or getattr(type(kinds), "__instancecheck__", None) == type.__instancecheck__
    if not plain and not hasattr(kinds, "_abc_impl") and issubclass(kind, torch.Tensor):
        raise TypeError(f"isinstance is asked of {name!r}, for {kinds!r}, and the trace cannot tell whether the tensor is one")
    return issubclass(kind, type(None) if kinds is None else kinds)
