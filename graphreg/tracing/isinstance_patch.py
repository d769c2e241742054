"""Answers ``isinstance``, ``type`` and ``callable`` in the model's code during a trace: values are proxies, or sizes are symbolic."""

from __future__ import annotations

import builtins
import functools
import inspect
import sys
import types
import typing
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch.fx.proxy import Attribute

from graphreg.torch_internals.modules import forward_hooks
from graphreg.torch_internals.patching import Changes
from graphreg.torch_internals.torch_modes import jit_namespace
from graphreg.tracing.global_queries import includes_query
from graphreg.tracing.side_effects.reachable_state import is_foreign_name, is_foreign_namespace
from graphreg.tracing.symbolic.proxies import Value
from graphreg.tracing.symbolic.questions import class_of, has_attribute, is_callable
from graphreg.tracing.type_inference import ATTRIBUTES, definite_type, is_tensor

Globals = dict[str, Any]

# values of these types belong to no global namespace
_DATA = frozenset({bool, int, float, complex, str, bytes, type(None), tuple, list, dict, set, frozenset})
_NUMBERS = {torch.SymInt: 0, torch.SymFloat: 0.0, torch.SymBool: False}
_DISTRIBUTIONS = tuple(vars(each) for each in vars(torch.distributions).values() if isinstance(each, types.ModuleType))
_WRAPPERS = (functools.partial, types.MethodType, staticmethod, classmethod, property)
_DECORATED = (types.FunctionType, functools._lru_cache_wrapper)


class Namespaces(NamedTuple):
    """The global namespaces of a model's code, and those of them that have a query of global state among their variables."""

    all: list[Globals]
    asking: list[Globals]


def model_globals(root: nn.Module) -> Namespaces:
    """Return the global namespaces of the model's classes, hooks and functions, and of what these refer to in the same packages."""
    return _namespaces(_model_code(root))


def answer_isinstance(changes: Changes, places: Iterable[Globals]) -> None:
    """Make ``isinstance``, ``type``, ``callable`` and ``hasattr`` work for traced values, until the block of ``changes`` ends.

    They do so in code whose globals are in ``places``. ``isinstance`` also works in ``torch.is_tensor``,
    ``torch.jit.isinstance`` and torch's distributions.
    """
    models = list(places)
    answers = {"isinstance": traced_isinstance, "type": TracedType, "callable": is_callable, "hasattr": has_attribute}
    for name, function in answers.items():
        changes.put_into([*models, *((vars(torch), jit_namespace(), *_DISTRIBUTIONS) if name == "isinstance" else ())], name, function)


class _AnswersType(type):
    """The class of ``TracedType``, which has it behave as ``type``, but for the class of a traced value."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        traced = len(args) == 1 and not kwargs and issubclass(builtins.type(args[0]), (Value, Attribute))
        return class_of(args[0]) if traced else builtins.type(*args, **kwargs)

    def __instancecheck__(cls, instance: Any) -> bool:
        return builtins.isinstance(instance, builtins.type)

    def __subclasscheck__(cls, subclass: type) -> bool:
        return issubclass(subclass, builtins.type)

    def __eq__(cls, other: object) -> bool:
        return other is builtins.type or other is TracedType

    def __hash__(cls) -> int:
        return hash(builtins.type)


class TracedType(type, metaclass=_AnswersType):
    """What a model's code has in place of ``type`` during a trace."""


class _Recorded(type):
    """The class of what stands for a class of torch during a trace. Where it is not called with traced values, it is that class."""

    original: Any
    record: Callable[..., Any]

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        traced = any(issubclass(builtins.type(each), (Value, Attribute)) for each in (*args, *kwargs.values()))
        return (cls.record if traced else cls.original)(*args, **kwargs)

    def __instancecheck__(cls, instance: Any) -> bool:
        return builtins.isinstance(instance, cls.original)


def recorded_class(original: type, record: Callable[..., Any]) -> Any:
    """Return what stands for a class of torch during a trace. ``record`` records a call with traced values."""
    return _Recorded(original.__name__, (), {"original": original, "record": staticmethod(record)})


def number_isinstance(value: object, kinds: Any) -> bool:
    """Do what ``isinstance`` does, but take a symbolic size of torch.export for a number."""
    return builtins.isinstance(_NUMBERS.get(type(value), value), kinds)


def _model_code(root: nn.Module) -> Iterator[Any]:
    """Yield the code that may run with the model: members of its modules' classes and their bases, hooks, and callable attributes.

    What libraries add to ``nn.Module`` itself is left out: transformers does, and would be searched for every model of the process.
    """
    seen: dict[type, None] = {}
    for module in root.modules():
        seen.update(dict.fromkeys(type(module).__mro__))
        yield from forward_hooks(module)
        yield from (value for value in vars(module).values() if callable(value))
    for kind in seen:
        if kind not in (nn.Module, object):
            yield from vars(kind).values()


def _namespaces(code: Iterable[Any]) -> Namespaces:
    """Return the global namespaces of this code, and further ones that the variables in these namespaces lead to.

    A further namespace must belong to a package of this code, to a package of a function or class
    in its namespaces, or to no package.
    """
    waiting = [place for place in _distinct_globals(code) if not is_foreign_namespace(place)]
    packages = {_home(place).package for place in waiting}.union(*(_variables(place).packages for place in waiting))
    namespaces = {id(place): place for place in waiting}
    seen, asking = set(namespaces), list[Globals]()
    while waiting:
        place = waiting.pop()
        variables = _variables(place)
        if variables.asks:
            asking.append(place)
        # A namespace may have thousands of entries, but they lead to few namespaces: find these
        # first.
        for further in variables.lead_to:
            if id(further) not in seen:
                seen.add(id(further))
                home = _home(further)
                # a file beside a script has no package, and may hold code of the model
                if home.package in packages or (home.may_be_file and "__path__" not in further):
                    namespaces[id(further)] = further
                    waiting.append(further)
    return Namespaces(list(namespaces.values()), asking)


class _Variables(NamedTuple):
    """What is known of the variables of a namespace while they have the same objects.

    Attributes:
        objects: A hash of the objects.
        lead_to: The namespaces of these modules, functions and classes.
        packages: The packages of these functions and classes, without torch and the like.
        asks: Whether one of the objects is a query.
    """

    objects: int
    lead_to: list[Globals]
    packages: frozenset[str]
    asks: bool


_known: dict[int, _Variables] = {}


def _variables(namespace: Globals) -> _Variables:
    """Return what is known of a namespace.

    Of a module it is kept: most modules never change, and to look at each variable of torchvision's, or of hypothesis, takes longer than to
    trace a small model.
    """
    values, name = list(namespace.values()), namespace.get("__name__")
    ids = tuple(map(id, values))
    home = sys.modules.get(name) if type(name) is str else None
    if not issubclass(type(home), types.ModuleType) or vars(home) is not namespace:  # any object may stand in ``sys.modules``
        return _looked_at(ids, values)
    known = _known.get(id(namespace))
    if known is None or known.objects != hash(ids):
        known = _known[id(namespace)] = _looked_at(ids, values)
    return known


def _looked_at(ids: tuple[int, ...], values: list[Any]) -> _Variables:
    imported = _distinct_globals(value for value in values if not issubclass(type(value), types.ModuleType))
    packages = frozenset(_home(place).package for place in imported if not is_foreign_namespace(place))
    return _Variables(hash(ids), _distinct_globals(values), packages, includes_query(ids))


class _Home(NamedTuple):
    """What the name of a namespace tells: its top-level package, and whether it may be a file without a package."""

    package: str
    may_be_file: bool


def _home(place: Globals) -> _Home:
    return _home_by_name(str(place.get("__name__", "")))


@functools.lru_cache(1 << 14)
def _home_by_name(name: str) -> _Home:
    return _Home(name.partition(".")[0], bool(name) and "." not in name and not is_foreign_name(name))


def _distinct_globals(things: Iterable[Any]) -> list[Globals]:
    """Return the namespaces of these modules, functions and classes, each once."""
    places = {id(place): place for thing in things if type(thing) not in _DATA and (place := _globals_of(thing)) is not None}
    return list(places.values())


def _globals_of(thing: Any) -> Globals | None:
    """Return the namespace of a module, the globals of a function (unwrapped), or those of the module that defines a class."""
    # by ``type``, because ``isinstance`` may run code of the user's: a ``__class__`` that is a
    # property
    if issubclass(type(thing), types.ModuleType):
        variables: Globals = vars(thing)
        return variables
    while issubclass(type(thing), _WRAPPERS):
        is_partial = issubclass(type(thing), functools.partial)
        thing = thing.func if is_partial else getattr(thing, "__func__", None) or getattr(thing, "fget", None)
    if type(thing) in _DECORATED:
        thing = vars(thing).get("__wrapped__", thing)
    elif callable(thing) and not issubclass(type(thing), type):
        thing = inspect.getattr_static(thing, "__wrapped__", thing)
    if type(thing) is types.FunctionType:
        return thing.__globals__
    home = sys.modules.get(thing.__module__) if issubclass(type(thing), type) else None
    return vars(home) if isinstance(home, types.ModuleType) else None


def traced_isinstance(value: object, kinds: Any) -> bool:
    """Do what ``isinstance`` does, also for traced values. Raise TypeError if the type of a traced value is not known."""
    if not issubclass(type(value), (Value, Attribute)):
        return builtins.isinstance(value, kinds)
    if kinds is fx.Proxy or (builtins.isinstance(kinds, tuple) and any(each is fx.Proxy for each in kinds)):
        # Whoever asks this wants to know whether a trace runs, as transformers does, and goes without
        # decisions on values then, as it does under Dynamo.
        return True
    traced: Any = value
    # Here the name of the attribute tells the type. To read ``traced.node``, as below, would add a
    # node to the graph.
    if issubclass(type(value), Attribute) and traced.attr in ATTRIBUTES and is_tensor(traced.root.node, traced.tracer):
        return _is_instance(ATTRIBUTES[traced.attr], kinds, traced.attr)
    kind = definite_type(traced.node, traced.tracer)
    if kind is None:
        kind = traced.tracer.kind(traced.node)
    if kind is None:
        traced.tracer.refuse(TypeError(f"the forward calls isinstance on {traced.node.name!r}, and the trace cannot tell its type"))
    known: Any = kind  # ``refuse`` raises
    return _is_instance(known, kinds, traced.node.name)


def _is_instance(kind: type, kinds: Any, name: str) -> bool:
    """Return whether a value of type ``kind`` is an instance of ``kinds``, which may be anything that ``isinstance`` accepts."""
    if builtins.isinstance(kinds, tuple):
        return any(_is_instance(kind, each, name) for each in kinds)
    if typing.get_origin(kinds) in (types.UnionType, typing.Union):
        return any(_is_instance(kind, each, name) for each in typing.get_args(kinds))
    plain = kinds is None or kinds is nn.Parameter or getattr(type(kinds), "__instancecheck__", None) == type.__instancecheck__
    if not plain and not hasattr(kinds, "_abc_impl") and issubclass(kind, torch.Tensor):
        raise TypeError(f"the forward calls isinstance on {name!r} with {kinds!r}, and the trace cannot tell whether the tensor is one")
    return issubclass(kind, type(None) if kinds is None else kinds)
