"""What a model's code may reach beside its modules: global names, closures, functions and classes, and what it assigns.

Names are followed, not values: a function that mentions ``step`` may call each method of that name of the model's classes. So more is
found than runs, and what is found is only looked at before and after.
"""

from __future__ import annotations

import dis
import functools
import types
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from torch import nn

from graphreg.torch_internals import forward_hooks
from graphreg.tracing.side_effects.places import content
from graphreg.tracing.symbolic.proxies import FOREIGN

_CLOCKS = {"time", "datetime", "uuid", "secrets"}  # what they tell is another thing at each call
_CALLED = {types.FunctionType, types.MethodType, functools.partial, functools._lru_cache_wrapper}
_UNCALLED = {"__init__", "__new__", "__init_subclass__", "__repr__", "__getstate__", "__setstate__", "__reduce__", "__deepcopy__"}
_MUTATORS = {
    "append", "appendleft", "extend", "insert", "pop", "popleft", "popitem", "remove", "clear", "update", "setdefault", "add", "discard",
}  # fmt: skip


@dataclass(frozen=True)
class Stored:
    """What code assigns: attributes and global variables by name; and the names of what it changes the items of."""

    attributes: frozenset[str] = frozenset()
    variables: frozenset[str] = frozenset()
    items: frozenset[str] = frozenset()

    def __or__(self, other: Stored) -> Stored:
        return Stored(self.attributes | other.attributes, self.variables | other.variables, self.items | other.items)


@dataclass
class Reach:
    """What is reached: the functions, the names that each space of global variables is asked for, the classes that stand there."""

    functions: dict[int, types.FunctionType] = field(default_factory=dict)
    variables: dict[int, tuple[dict[str, Any], set[str]]] = field(default_factory=dict)
    classes: dict[type, None] = field(default_factory=dict)
    mentioned: set[str] = field(default_factory=set)
    clocks: bool = False  # it asks what time it is, or the like

    @property
    def stored(self) -> Stored:
        return functools.reduce(Stored.__or__, (stored(function.__code__) for function in self.functions.values()), Stored())


def others(kind: type) -> bool:
    """Whether a class is nobody's model code."""
    return kind.__module__.partition(".")[0] in FOREIGN


def reached(modules: Iterable[nn.Module]) -> Reach:
    """What the forwards of modules reach, with their hooks and what is set on them."""
    return _Search().run(modules)


class _Search:
    def __init__(self) -> None:
        self.found = Reach()
        self._methods: dict[str, list[Any]] = defaultdict(list)  # of the classes known so far, by name
        self._kinds, self._waiting = set[type](), list[types.FunctionType]()
        self._direct: set[int] = set()  # the forwards, and the functions that these call by name

    def run(self, modules: Iterable[nn.Module]) -> Reach:
        """Follow the code of the modules, and of what it names, until nothing new is found."""
        kinds: dict[type, None] = {}
        for module in modules:
            kinds[type(module)] = None
            kinds |= {type(value): None for value in vars(module).values()}
            for called in forward_hooks(module):
                self._function(called)
            for value in vars(module).values():
                self._held(value)
        for kind in kinds:
            self._class(kind)
        while self._waiting:
            self._look(self._waiting.pop())
        return self.found

    def _held(self, value: Any) -> None:
        """Functions that a module has as attributes, or in a list or a dict."""
        if type(value) in _CALLED:
            self._function(value, True)
        elif type(value) in (list, tuple, dict):
            for item in value.values() if isinstance(value, dict) else value:
                if type(item) in _CALLED:
                    self._function(item, True)

    def _class(self, kind: type) -> None:
        for base in kind.__mro__:
            if base in self._kinds or others(base):
                continue
            self._kinds.add(base)
            for name, value in list(vars(base).items()):
                self._methods[name].append(value)
                special = name.startswith("__") and name not in _UNCALLED
                forward = name == "forward" and issubclass(base, nn.Module)
                if forward or special or name in self.found.mentioned:
                    self._function(value, forward)

    def _function(self, thing: Any, direct: bool = False) -> None:
        """A function, wherever it is inside partials, decorators, methods and properties."""
        for function in _functions(thing):
            if direct:
                self._direct.add(id(function))
            if id(function) not in self.found.functions and not _foreign(function.__globals__):
                self.found.functions[id(function)] = function
                self._waiting.append(function)

    def _look(self, function: types.FunctionType) -> None:
        names, space, direct = _names(function.__code__), function.__globals__, id(function) in self._direct
        _, asked = self.found.variables.setdefault(id(space), (space, set()))
        for name in names - self.found.mentioned:
            self.found.mentioned.add(name)
            for method in self._methods.get(name, ()):
                self._function(method)
        for name in names - asked:
            if name in space:
                asked.add(name)
                self._value(space[name], names, direct)
        for cell in function.__closure__ or ():
            self._value(content(cell), names, direct)

    def _value(self, value: Any, names: frozenset[str], direct: bool) -> None:
        if direct:
            self.found.clocks |= _home(value) in _CLOCKS
        if isinstance(value, types.ModuleType):
            if not _foreign(vars(value)):
                self._module(vars(value), names, direct)
        elif isinstance(value, type):
            if not others(value):
                self.found.classes[value] = None
                self._class(value)
                self._function(vars(value).get("__init__"))
        elif callable(value) and next(_functions(value), None) is not None:
            self._function(value, direct)
        elif not others(type(value)):
            self._class(type(value))

    def _module(self, space: dict[str, Any], names: frozenset[str], direct: bool) -> None:
        _, asked = self.found.variables.setdefault(id(space), (space, set()))
        for name in names - asked:
            if name in space:
                asked.add(name)
                self._value(space[name], names, direct)


def _home(value: Any) -> str:
    """The module that a value is, or that it is from."""
    named = isinstance(value, (types.FunctionType, types.BuiltinFunctionType, type))
    return value.__name__ if isinstance(value, types.ModuleType) else str(value.__module__) if named else ""


def _foreign(space: dict[str, Any]) -> bool:
    return str(space.get("__name__", "")).partition(".")[0] in FOREIGN


def _functions(thing: Any) -> Iterator[types.FunctionType]:
    while True:
        if isinstance(thing, functools.partial):
            thing = thing.func
        elif isinstance(thing, (types.MethodType, staticmethod, classmethod)):
            thing = thing.__func__
        elif isinstance(thing, property):
            yield from (each for part in (thing.fset, thing.fdel) if part is not None for each in _functions(part))
            thing = thing.fget
        elif isinstance(thing, functools.cached_property):
            thing = thing.func
        else:
            break
    if isinstance(thing, types.FunctionType):
        yield thing
    if isinstance(thing, (types.FunctionType, functools._lru_cache_wrapper)) and "__wrapped__" in vars(thing):
        yield from _functions(vars(thing)["__wrapped__"])


@lru_cache(8192)
def _names(code: types.CodeType) -> frozenset[str]:
    """The global names, attributes and variables around it that code mentions, with the functions in it."""
    inner = (_names(each) for each in code.co_consts if isinstance(each, types.CodeType))
    return frozenset((*code.co_names, *code.co_freevars)).union(*inner)


@lru_cache(8192)
def stored(code: types.CodeType) -> Stored:
    """What code assigns, with the functions in it."""
    dynamic = {"setattr", "vars", "__dict__"}.intersection(code.co_names)  # then the name may be any text in it
    texts = (each for each in code.co_consts if dynamic and isinstance(each, str) and each.isidentifier())
    attributes, variables, items, loaded, subscripts = set(texts), set[str](), set[str](), "", False
    named = set[str]()
    for step in dis.get_instructions(code):
        kind, name = step.opname, str(step.argval)
        if kind == "STORE_ATTR":
            attributes.add(name)
        elif kind in ("STORE_GLOBAL", "DELETE_GLOBAL", "STORE_DEREF", "DELETE_DEREF"):
            variables.add(name)
        elif kind in ("STORE_SUBSCR", "DELETE_SUBSCR", "STORE_SLICE"):
            subscripts = True
        elif kind in ("LOAD_ATTR", "LOAD_METHOD", "LOAD_GLOBAL", "LOAD_NAME", "LOAD_DEREF"):
            if name in _MUTATORS and loaded:
                items.add(loaded)
            loaded = name
            named.add(name)
        elif kind not in ("PUSH_NULL", "CACHE", "PRECALL"):
            loaded = ""
    found = Stored(frozenset(attributes), frozenset(variables), frozenset(items | named if subscripts else items))
    inner = (stored(each) for each in code.co_consts if isinstance(each, types.CodeType))
    return functools.reduce(Stored.__or__, inner, found)
