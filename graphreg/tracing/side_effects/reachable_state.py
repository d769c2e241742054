"""Finds what a model's code can reach outside the model's modules (globals, closures, functions, classes), and what the code assigns.

The search follows names, not values: a function that mentions ``step`` may call any method of that
name in the model's classes. So the search finds more code than runs in a call. The search itself
calls nothing. The state that it finds is only compared before and after a trace.
"""

from __future__ import annotations

import dis
import functools
import gc
import importlib.util
import sys
import threading
import types
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd import Function

from graphreg.ir.contents import FOREIGN
from graphreg.torch_internals.modules import REGISTERED, forward_hooks
from graphreg.torch_internals.operators import CustomOpDef, operator_functions, python_operators
from graphreg.tracing.side_effects.state_places import OBJECTS, content, own_attributes

# modules whose functions return another value at each call
_CLOCKS = {"time", "datetime", "uuid", "secrets"}
_CONTAINERS = {list, tuple, dict, set, frozenset, OrderedDict}
_CODE = {types.FunctionType, types.BuiltinFunctionType, types.ModuleType, type}
_PLAIN = {bool, int, float, complex, str, bytes, type(None), Tensor, nn.Parameter, torch.dtype, torch.device, torch.Size}
_SEQUENCES = (list, tuple, set, frozenset, deque)
VIEWS: tuple[type, ...] = (type({}.keys()), type({}.values()), type({}.items()))
# Special methods that the search leaves out, unless the code mentions their names. It assumes that
# a forward may call any other special method implicitly, through an operator or a built-in
# function.
_UNCALLED = {"__init__", "__new__", "__init_subclass__", "__repr__", "__getstate__", "__setstate__", "__reduce__", "__deepcopy__"}
# What ``torch.autograd.Function.apply`` calls, and later the backward pass.
_OF_APPLY = {"forward", "setup_context", "backward", "vjp", "jvp", "vmap"}
_MUTATORS = {
    "append", "appendleft", "extend", "insert", "pop", "popleft", "popitem", "remove", "clear", "update", "setdefault", "add", "discard",
}  # fmt: skip


@dataclass(frozen=True)
class Assigned:
    """What code assigns.

    Attributes:
        attributes: The names of attributes.
        variables: The names of global and closure variables.
        items: The names of variables and attributes whose items the code may change, such as the
            elements of a list.
    """

    attributes: frozenset[str] = frozenset()
    variables: frozenset[str] = frozenset()
    items: frozenset[str] = frozenset()

    def __or__(self, other: Assigned) -> Assigned:
        return Assigned(self.attributes | other.attributes, self.variables | other.variables, self.items | other.items)


@dataclass
class ReachableCode:
    """What a model's code can reach.

    Attributes:
        functions: The functions by id.
        variables: A dict. Each key is the id of a global namespace; the value is the namespace, and
            those of its names that the code mentions.
        classes: The classes.
        mentioned: All names that the code mentions.
        caches: The caches of functions and methods (``functools.lru_cache``), by id.
        clocks: Whether a forward, or a function that it calls by name, mentions a Python module
            such as ``time`` or ``uuid``, or a function or class from such a module.
    """

    functions: dict[int, types.FunctionType] = field(default_factory=dict)
    variables: dict[int, tuple[dict[str, Any], set[str]]] = field(default_factory=dict)
    classes: dict[type, None] = field(default_factory=dict)
    mentioned: set[str] = field(default_factory=set)
    caches: dict[int, Any] = field(default_factory=dict)
    clocks: bool = False

    def values(self) -> Iterator[Any]:
        """Yield the values of the global and closure variables that the code mentions."""
        for space, names in self.variables.values():
            yield from (space[name] for name in names if name in space)
        for function in self.functions.values():
            yield from variables_around(function)

    @property
    def assigned(self) -> Assigned:
        """What the functions assign."""
        return functools.reduce(Assigned.__or__, (assigned_by(function.__code__) for function in self.functions.values()), Assigned())


def variables_around(function: types.FunctionType) -> Iterator[Any]:
    """Return the values of the variables of the functions around a function that its code uses."""
    return map(content, function.__closure__ or ())


def is_foreign_class(kind: type) -> bool:
    """Return whether a class is no part of a model, because it is from torch, graphreg, Python's library or the like (``FOREIGN``)."""
    return is_foreign_name(kind.__module__)


def is_foreign_name(name: object) -> bool:
    """Return whether a Python module of this name is no part of a model, because it is in a package of ``FOREIGN``."""
    return str(name).partition(".")[0] in FOREIGN


def is_installed(file: object) -> bool:
    """Return whether a file of Python code belongs to an installed package. There are hundreds of variables, which users do not change."""
    folders = str(file).replace("\\", "/")
    return "/site-packages/" in folders or "/dist-packages/" in folders


def is_own(value: Any) -> bool:
    """Return whether a function or class is the user's own, and not of ``FOREIGN`` or of an installed package."""
    function = issubclass(type(value), types.FunctionType)
    file = value.__code__.co_filename if function else getattr(sys.modules.get(value.__module__), "__file__", "")
    return not is_foreign_name(value.__module__) and not is_installed(file)


def is_entered(kind: type) -> bool:
    """Return whether the search enters objects of a class: of modules, of the user's own classes, and of some of Python's library."""
    return is_own(kind) or issubclass(kind, (nn.Module, *OBJECTS))


def reachable_code(
    modules: Iterable[nn.Module], functions: Iterable[types.FunctionType] = (), values: Iterable[Any] = ()
) -> ReachableCode:  # fmt: skip
    """Return what can be reached from functions, other values, and modules' forwards, hooks, and the functions in their attributes."""
    return _StateSearch().run(modules, functions, values)


class _Found(threading.local):
    latest: tuple[list[nn.Module], ReachableCode] | None = None


_found = _Found()


def keep_for_next(modules: list[nn.Module], code: ReachableCode | None) -> None:
    """Keep what was found for ``code_of``, which is called next, before any code of the user's runs; with None, nothing is kept."""
    _found.latest = None if code is None else (modules, code)


def code_of(modules: list[nn.Module]) -> ReachableCode:
    """Return what ``reachable_code`` does for modules. What ``keep_for_next`` has kept serves once, since a search takes long."""
    latest, _found.latest = _found.latest, None
    return latest[1] if latest is not None and list(map(id, latest[0])) == list(map(id, modules)) else reachable_code(modules)


class _StateSearch:
    """A search that follows names, from modules to everything that their code can reach."""

    def __init__(self) -> None:
        self.code = ReachableCode()
        # the members of the classes and objects known so far, by name
        self._members: dict[str, list[Any]] = defaultdict(list)
        self._spaces = list[dict[str, Any]]()  # of the Python modules that something holds
        self._kinds, self._waiting = set[type](), list[types.FunctionType]()
        self._seen = set[int]()  # ids of values
        # ids of forwards, of functions in modules' attributes, and of functions that these call by
        # name
        self._direct: set[int] = set()

    def run(self, modules: Iterable[nn.Module], functions: Iterable[types.FunctionType], values: Iterable[Any]) -> ReachableCode:
        """Follow the code of modules, functions and values, and the code that it mentions, until nothing new is found."""
        modules = list(modules)
        for value in values:
            # code may read any variable of a Python module that it gets
            self._value(value, frozenset(vars(value)) if issubclass(type(value), types.ModuleType) else frozenset(), False)
        for function in functions:
            self._function(function, True)
        self._seen.update(map(id, modules))
        for module in modules:
            for called in forward_hooks(module):
                self._function(called)
            self._enter([value for name, value in vars(module).items() if name not in REGISTERED], True)
        for kind in dict.fromkeys(map(type, modules)):
            self._class(kind)
        operators = python_operators()
        while self._waiting:
            self._look(self._waiting.pop())
            # ``torch.ops.mylib.scale`` is found by its name alone
            for name in [name for name in operators if name.rpartition("::")[2] in self.code.mentioned] if not self._waiting else ():
                for function in operators.pop(name):
                    self._function(function)
        return self.code

    def _enter(self, values: list[Any], direct: bool) -> None:
        """Add what code can reach through values that modules, classes, objects and variables hold, at any depth.

        Of an object and of a Python module, only that counts whose name the code mentions, now or later. Objects of installed packages
        are not entered: through pytest's configuration, for example, code could reach all tests.
        """
        waiting = list(values)
        for value in waiting:
            kind = type(value)
            if kind in _PLAIN or (kind in _CONTAINERS and not value):  # as most are
                continue
            self._function(value, direct)
            if id(value) in self._seen:
                continue
            self._seen.add(id(value))
            if issubclass(kind, types.ModuleType):
                if not is_foreign_namespace(vars(value)):
                    self._spaces.append(vars(value))
                    self._module(vars(value), frozenset(self.code.mentioned), direct)
            elif issubclass(kind, type):
                self._value(value, frozenset(), direct)
            elif kind is CustomOpDef:
                waiting += operator_functions(value)
            else:
                waiting += inside(value)
                self._class(kind)
                if is_entered(kind):
                    for name, each in held(value).items():
                        if name in self.code.mentioned:
                            waiting.append(each)
                        else:
                            self._members[name].append(each)

    def _class(self, kind: type) -> None:
        """Add a class and its bases: their forwards, their special methods, and the methods whose names the code mentions."""
        for base in kind.__mro__:
            if base in self._kinds or is_foreign_class(base):
                continue
            self._kinds.add(base)
            if not is_foreign_class(type(base)):
                self.code.classes[type(base)] = None
                self._class(type(base))
            for name, value in list(vars(base).items()):
                self._members[name].append(value)
                special = name.startswith("__") and name not in _UNCALLED
                forward = name == "forward" and issubclass(base, nn.Module)
                of_apply = name in _OF_APPLY and issubclass(base, Function)
                if forward or of_apply or special or name in self.code.mentioned:
                    self._function(value, forward)
                if name in self.code.mentioned:
                    self._enter([value], False)

    def _function(self, value: Any, direct: bool = False) -> None:
        """Add the functions that ``_functions`` finds in a value. ``direct``: whether their ids belong in ``_direct``."""
        for function in _functions(value):
            if issubclass(type(function), functools._lru_cache_wrapper):
                inner = function.__wrapped__
                if not issubclass(type(inner), types.FunctionType) or not is_foreign_name(inner.__globals__.get("__name__")):
                    self.code.caches[id(function)] = function
                continue
            if direct:
                self._direct.add(id(function))
            if id(function) not in self.code.functions and not is_foreign_namespace(function.__globals__):
                self.code.functions[id(function)] = function
                self._waiting.append(function)

    def _look(self, function: types.FunctionType) -> None:
        """Add everything that a function mentions: methods, global variables and closure variables."""
        names, space, direct = _mentioned_names(function.__code__), function.__globals__, id(function) in self._direct
        _, names_read = self.code.variables.setdefault(id(space), (space, set()))
        new = names - self.code.mentioned
        self.code.mentioned |= new
        for name in new:
            self._enter(self._members.get(name, []), False)
        for held_space in self._spaces:
            self._module(held_space, new, False)
        for name in names - names_read:
            # ``self.n`` reads no global ``n``; whether that is a function is no matter, since methods are found by name, too
            if name in space and (type(space[name]) in _CODE or name in _global_names(function.__code__)):
                names_read.add(name)
                self._value(space[name], names, direct)
        for cell in function.__closure__ or ():
            self._value(content(cell), names, direct)
        for module in _imported_modules(function):
            self._value(module, names, direct)

    def _value(self, value: Any, names: frozenset[str], direct: bool) -> None:
        """Add what can be reached through the value of a variable.

        Args:
            value: The value.
            names: All names mentioned by the function that reads the variable.
            direct: Whether that function is a forward, or a forward calls it by name.
        """
        if direct:
            has_module = issubclass(type(value), (types.FunctionType, types.BuiltinFunctionType, type))
            module = value.__name__ if issubclass(type(value), types.ModuleType) else str(value.__module__) if has_module else ""
            self.code.clocks |= module in _CLOCKS

        if issubclass(type(value), types.ModuleType):
            if not is_foreign_namespace(vars(value)):
                self._module(vars(value), names, direct)
        elif issubclass(type(value), type):
            if not is_foreign_class(value):
                self.code.classes[value] = None
                self._class(value)
                # code that mentions a class may make objects of it
                for name in ("__new__", "__init__"):
                    self._function(vars(value).get(name))
        else:
            self._enter([value], direct)

    def _module(self, space: dict[str, Any], names: frozenset[str], direct: bool) -> None:
        """Add those variables of a Python module whose names the code mentions."""
        _, names_read = self.code.variables.setdefault(id(space), (space, set()))
        for name in names - names_read:
            if name in space:
                names_read.add(name)
                self._value(space[name], names, direct)


def is_foreign_namespace(space: dict[str, Any]) -> bool:
    """Return whether a global namespace belongs to torch, graphreg, Python's library or a package such as numpy (``FOREIGN``)."""
    return is_foreign_name(space.get("__name__", ""))


def inside(value: Any) -> list[Any]:
    """Return the items of a container, the parts of a partial or a method, or what a weak reference or context variable refers to.

    No code of the user is called: subclasses of Python's containers are read as Python's own.
    """
    kind = type(value)
    if issubclass(kind, dict):
        # only its own methods know its order
        base = OrderedDict if issubclass(kind, OrderedDict) else dict
        return [*base.keys(value), *base.values(value)]
    for each in _SEQUENCES:
        if issubclass(kind, each):
            return list(cast(Any, each).__iter__(value))
    if issubclass(kind, functools.partial):
        return [value.func, value.args, value.keywords]
    if issubclass(kind, (types.MethodType, types.BuiltinFunctionType)):
        return [value.__self__]
    if issubclass(kind, weakref.ref):
        return [weakref.ref.__call__(value)]
    if kind is ContextVar:
        return [value.get(None)]
    if kind in VIEWS:
        return inside(value.mapping)
    if kind is types.MappingProxyType:  # of a dict or of any mapping of the user's
        return [each for each in gc.get_referents(value) if type(each) is dict]
    if issubclass(kind, types.SimpleNamespace):
        return list(object.__getattribute__(value, "__dict__").values())
    return []


def slots(kind: type) -> dict[str, Any]:
    """Return the slots of a class, which is the user's or of a package, and of its bases."""
    own = [base for base in reversed(kind.__mro__) if "__slots__" in vars(base) and not is_foreign_class(base)]
    return {name: slot for base in own for name, slot in vars(base).items() if type(slot) is types.MemberDescriptorType}


def held(value: Any) -> dict[str, Any]:
    """Return the attributes and slots of an object, whose class reads them as it likes. No code of the user runs."""
    found = dict(own_attributes(value) or {})
    for name, slot in slots(type(value)).items():
        with suppress(AttributeError):  # it is empty
            found[name] = slot.__get__(value)
    return found


def _functions(value: Any) -> Iterator[Any]:
    """Yield the value if it is a function or has a cache; yield what is inside a partial, decorated function, method or property."""
    while True:
        if issubclass(type(value), functools.partial):
            value = value.func
        elif issubclass(type(value), (types.MethodType, staticmethod, classmethod)):
            value = value.__func__
        elif issubclass(type(value), property):
            yield from (each for part in (value.fset, value.fdel) if part is not None for each in _functions(part))
            value = value.fget
        elif issubclass(type(value), functools.cached_property):
            value = value.func
        else:
            break
    if issubclass(type(value), (types.FunctionType, functools._lru_cache_wrapper)):
        yield value
    if issubclass(type(value), (types.FunctionType, functools._lru_cache_wrapper)) and "__wrapped__" in vars(value):
        yield from _functions(vars(value)["__wrapped__"])


@lru_cache(8192)
def _mentioned_names(code: types.CodeType) -> frozenset[str]:
    """Return the global names, attributes and closure variables that code and its inner functions mention, also as strings."""
    inner = (_mentioned_names(each) for each in code.co_consts if isinstance(each, types.CodeType))
    texts = (each for each in code.co_consts if isinstance(each, str) and each.isidentifier())
    return frozenset((*code.co_names, *code.co_freevars, *texts)).union(*inner)


def names_in_methods(kind: type[nn.Module]) -> frozenset[str]:
    """Return the names that the methods of a class of modules mention, without those of ``nn.Module``."""
    methods = [each for base in kind.__mro__ if base not in (nn.Module, object) for each in vars(base).values()]
    return frozenset[str]().union(*(_mentioned_names(each.__code__) for each in methods if isinstance(each, types.FunctionType)))


@lru_cache(8192)
def _global_names(code: types.CodeType) -> frozenset[str]:
    """Return the names of global variables that code and its inner functions read, set or delete."""
    own = {str(step.argval) for step in dis.get_instructions(code) if step.opname.endswith(("_GLOBAL", "_NAME"))}
    own |= {each for each in code.co_consts if isinstance(each, str) and "globals" in own}
    inner = (_global_names(each) for each in code.co_consts if isinstance(each, types.CodeType))
    return frozenset(own).union(*inner)


def _imported_modules(function: types.FunctionType) -> Iterator[types.ModuleType]:
    """Yield those Python modules that the code of a function imports, if they have been imported by now."""
    for name, level in _imports(function.__code__):
        try:
            path = importlib.util.resolve_name("." * level + name, function.__globals__.get("__package__"))
        except ImportError:  # the import fails, too
            continue
        for loaded in map(sys.modules.get, dict.fromkeys((path, path.partition(".")[0]))):
            if loaded is not None and issubclass(type(loaded), types.ModuleType):
                yield loaded


@lru_cache(8192)
def _imports(code: types.CodeType) -> frozenset[tuple[str, int]]:
    """Return the names in the ``import`` statements of code and its inner functions, each with its number of leading dots.

    ``sys.modules["home"]`` and ``import_module("home")`` count, too.
    """
    steps = list(dis.get_instructions(code))
    own = [(str(step.argval), steps[i - 2].argval) for i, step in enumerate(steps) if step.opname == "IMPORT_NAME"]
    by_text = not {"import_module", "__import__", "modules"}.isdisjoint(code.co_names)
    own += [(each, 0) for each in code.co_consts if isinstance(each, str) and each and by_text]
    inner = (_imports(each) for each in code.co_consts if isinstance(each, types.CodeType))
    return frozenset(own).union(*inner)


@lru_cache(8192)
def assigned_by(code: types.CodeType) -> Assigned:
    """Return what code and its inner functions assign."""
    # if the code mentions one of these, any of its string constants may be the name of an attribute
    # that it assigns
    dynamic = {"setattr", "vars", "__dict__"}.intersection(code.co_names)
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
            # ``self.seen.append(x)`` loads ``seen``, the container, directly before ``append``
            if name in _MUTATORS and loaded:
                items.add(loaded)
            loaded = name
            named.add(name)
        elif kind not in ("PUSH_NULL", "CACHE", "PRECALL"):
            loaded = ""

    # which name is that of the container in ``a[b] = c``, the instructions do not show
    outer = Assigned(frozenset(attributes), frozenset(variables), frozenset(items | named if subscripts else items))
    inner = (assigned_by(each) for each in code.co_consts if isinstance(each, types.CodeType))
    return functools.reduce(Assigned.__or__, inner, outer)
