"""Hides the state that opaque modules change. One more trace then shows whether traced code reads that state.

An opaque module may change state at each call of the graph. If traced code reads this state, the
graph contains the value from the trace, and is wrong at later calls. A value is hidden by replacing
it: if code reads the replacement, the trace raises or gives another graph.
"""

from __future__ import annotations

import inspect
import sys
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from functools import partial
from types import FunctionType, MethodType
from typing import Any

from torch import nn

from graphreg.torch_internals.modules import OWN_ATTRIBUTES, REGISTERED, forward_hooks
from graphreg.torch_internals.patching import Changes
from graphreg.tracing.side_effects.reachable_state import (
    Assigned,
    ReachableCode,
    assigned_by,
    is_foreign_class,
    is_installed,
    reachable_code,
    variables_around,
)
from graphreg.tracing.side_effects.snapshot import Snapshot
from graphreg.tracing.side_effects.stand_ins import ChangingNumber, StaleValue
from graphreg.tracing.side_effects.state_places import NOTHING, Attributes, Cells, Container, Items, Variables, is_plain


class FunctionNeeded(BaseException):
    """Ends a trace that failed in a function. The caller traces again, with the function opaque.

    This is a BaseException, so that no ``except Exception`` between the tracer and its caller
    catches it.
    """

    def __init__(self, opaque: dict[str, str]) -> None:
        super().__init__()
        self.opaque = opaque


def key_of(function: FunctionType) -> str:
    """Return the key of an opaque function among the opaque modules, whose keys are their paths."""
    return f"{function.__module__}.{function.__qualname__}()"


def function_of(key: str) -> FunctionType | None:
    """Return the function that has a key; None if the key is the path of a module, or if there is no such function."""
    home, _, name = key.removesuffix("()").rpartition(".")
    function = getattr(sys.modules.get(home), name, None) if key.endswith("()") else None
    return function if isinstance(function, FunctionType) else None


def opaque_functions(opaque: Mapping[str, str]) -> list[FunctionType]:
    """Return the functions among opaque modules and functions."""
    return [function for function in map(function_of, opaque) if function is not None]


def untraced_modules(model: nn.Module, opaque: Mapping[str, str]) -> list[nn.Module]:
    """Return the modules whose code is the user's and is not traced: opaque modules, their submodules, and torch's layers with hooks."""
    paths = [path for path in opaque if path and not path.endswith("()")]
    opaque_contents = [module for path in paths for module in model.get_submodule(path).modules()]
    hooked = [module for module in model.modules() if is_foreign_class(type(module)) and forward_hooks(module)]
    return list(dict.fromkeys([*(module for module in opaque_contents if not is_foreign_class(type(module))), *hooked]))


class OpaqueState:
    """Hides the state that modules change. The snapshot ``before`` restores it later."""

    def __init__(self, before: Snapshot) -> None:
        """Prepare to hide state that is in the snapshot ``before``."""
        before.open_containers(every=True)
        self._attributes = {id(place.owner): place for place in before.places if type(place) is Attributes}
        self._variables = [place for place in before.places if isinstance(place, (Variables, Cells))]
        self._containers = {id(place.owner): place for place in before.places if isinstance(place, (Container, Items))}
        self._names: dict[str, None] = {}

    def hide(self, modules: Iterable[nn.Module], functions: Iterable[FunctionType], called: AbstractSet[int]) -> list[str]:
        """Hide the state that these modules and functions change, and return the names of the hidden state.

        ``called``: the ids of the modules that the graph calls. The hooks of others run during the trace.
        """
        known: dict[type, ReachableCode] = {}
        for module in modules:
            # modules of one class run the same code, but for what an instance has of its own
            hooked = forward_hooks(module)
            if hooked or "forward" in vars(module) or type(module) not in known:
                known[type(module)] = reachable_code([module])
            self._hide_module(module, known[type(module)])
            callbacks = [value for value in vars(module).values() if type(value) in (MethodType, partial)]
            for function in (*hooked, *callbacks) if id(module) in called else ():
                self._hide_of_callback(function)
        for function in functions:
            code = reachable_code((), [function])
            self._hide_shared(code.classes, code)
            self._hide_objects(code)
        return list(self._names)

    def _hide_module(self, module: nn.Module, code: ReachableCode) -> None:
        """Hide what the code of one module assigns, and the items of containers that this code changes."""
        assigned = code.assigned
        # the graph itself reads parameters, buffers and modes at each call
        registered = {name for kind in REGISTERED for name in vars(module)[kind]} | OWN_ATTRIBUTES
        for name in sorted(assigned.attributes - registered):
            self._hide_attribute(self._attributes[id(module)], name, module)
        for name in sorted((assigned.items & vars(module).keys()) - OWN_ATTRIBUTES):
            self._hide_items(vars(module)[name], self._attributes[id(module)].label(name))
        self._hide_shared((*type(module).__mro__, *code.classes), code)

    def _hide_shared(self, kinds: Iterable[type], code: ReachableCode) -> None:
        """Hide what code assigns to these classes, and to global and closure variables."""
        assigned = code.assigned
        # a count or the like that all instances share, as an attribute of their class
        for kind in kinds:
            if (place := self._attributes.get(id(kind))) is not None:
                for name in sorted(name for name in assigned.attributes & place.content.keys() if is_plain(place.content[name])):
                    self._hide(place, name, place.content[name])
        for place, name in self._variables_of(code):
            if name in assigned.variables:
                self._hide(place, name, place.content[name])
            elif name in assigned.items:
                self._hide_items(place.content[name], place.label(name))

    def _hide_of_callback(self, hook: Any) -> None:
        """Hide what a hook, or another function that a module got, assigns in what it holds: its object, its arguments, its closure."""
        assigned, objects, texts = _assigned_by_hook(hook)
        self._hide_in({id(each) for each in objects if not issubclass(type(each), type)}, assigned, texts)

    def _hide_objects(self, code: ReachableCode) -> None:
        """Hide what code may change in the objects that it reaches: attributes that it assigns, and items of containers."""
        reached = {*map(id, code.values()), *code.functions}
        for function in code.functions.values():
            reached.update(map(id, (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())))
        self._hide_in(reached, code.assigned)

    def _hide_in(self, reached: AbstractSet[int], assigned: Assigned, keys: Iterable[str] = ()) -> None:
        """Hide the attributes that code assigns in the objects with these ids, and the items of those of them that are containers.

        ``keys``: those of a dict that code may get, as by ``stored.get("features")`` of an empty one.
        """
        for place in [place for place in self._attributes.values() if id(place.owner) in reached]:
            # other classes may have attributes with the names of a module's own
            names = place.content.keys() - (OWN_ATTRIBUTES if issubclass(type(place.owner), nn.Module) else ())
            for name in sorted(assigned.attributes & names):
                self._hide(place, name, place.content[name])
            for name in sorted(assigned.items & names):
                self._hide_items(place.content[name], place.label(name))
        if assigned.items:
            for found in [place for key, place in self._containers.items() if key in reached]:
                self._hide_items(found.owner, found.name, keys)

    def _variables_of(self, code: ReachableCode) -> Iterator[tuple[Attributes, str]]:
        """Yield the global and closure variables that this code can reach: the place and the name of each."""
        functions = set(code.functions)
        for place in self._variables:
            if isinstance(place, Cells):
                names = set(place.content) if id(place.owner) in functions else set()
            elif is_installed(place.owner.get("__file__", "")):  # such as registries, in which a class must not be entered twice
                names = set()
            else:
                names = code.variables.get(id(place.owner), ({}, set()))[1]
            yield from ((place, name) for name in sorted(names & place.content.keys()))

    def _hide_attribute(self, place: Attributes, name: str, module: nn.Module) -> None:
        """Hide an attribute of a module, even one that does not exist yet because the first call makes it."""
        if name in vars(module):
            self._hide(place, name, vars(module)[name])
        # a property, or a default of the class, is no state of the instance
        elif not hasattr(type(module), name):
            self._hide(place, name, NOTHING)

    def _hide(self, place: Attributes, name: str, value: Any) -> None:
        """Replace a value, unless it can be called. If code reads the replacement, the next trace raises or gives another graph."""
        if isinstance(value, nn.Module) or callable(value):
            return
        place.set(name, _different(value))
        self._names[place.label(name)] = None

    def _hide_items(self, value: Any, label: str, keys: Iterable[str] = ()) -> None:
        """Replace the items of a container by values that raise when code reads them, and add one more item.

        ``keys``: those of a dict that it may get.
        """
        place = self._containers.get(id(value))
        if place is not None:
            # one more, because the forward may ask for the length alone
            items = [StaleValue() for _ in range(len(place.content) + 1)]
            more = {**dict(zip([*place.content, items[-1]], items, strict=True)), **{key: StaleValue() for key in keys}}
            place.fill(more if isinstance(value, dict) else items)
            self._names[label] = None


def _assigned_by_hook(hook: Any) -> tuple[Assigned, list[Any], list[str]]:
    """Return what the code of a hook itself assigns, the objects that it holds, and the texts in its code."""
    called = getattr(hook, "func", hook)  # of a partial
    function = getattr(called, "__func__", called)
    if not isinstance(function, FunctionType):  # an object that is called
        function = inspect.getattr_static(type(called), "__call__", None)
    if not isinstance(function, FunctionType):
        return Assigned(), [], []
    objects = [called, getattr(called, "__self__", None), *getattr(hook, "args", ()), *variables_around(function)]
    return assigned_by(function.__code__), objects, [each for each in function.__code__.co_consts if isinstance(each, str)]


class _Checking(threading.local):
    # while a trace is checked: what puts back what ``leave_stale_values`` has changed
    changes: Changes | None = None


_checking = _Checking()


@contextmanager
def hooks_leave_stale_values() -> Iterator[None]:
    """Within the context, ``leave_stale_values`` acts. Afterwards, what it has changed is put back."""
    with Changes() as changes, changes:
        _checking.changes = changes
        try:
            yield
        finally:
            _checking.changes = None


def leave_stale_values(module: nn.Module) -> None:
    """Put stale values where the hooks of a module that the graph calls store something: the forward may have emptied it before."""
    changes = _checking.changes
    if changes is None:
        return
    for hook in forward_hooks(module):
        assigned, objects, texts = _assigned_by_hook(hook)
        for each in objects:
            own: Any = getattr(each, "__dict__", None)
            content: dict[str, Any] = own if type(own) is dict else {}
            names = content.keys() - OWN_ATTRIBUTES
            for name in sorted(assigned.attributes & names):
                if not (isinstance(content[name], nn.Module) or callable(content[name])):
                    changes.put(content, name, StaleValue())
            for value in (each, *(content[name] for name in sorted(assigned.items & names))) if assigned.items else ():
                if type(value) is list:
                    changes.later(partial(value.__setitem__, slice(None), list(value)))
                    value.append(StaleValue())
                elif type(value) in (dict, OrderedDict):
                    changes.later(partial(_fill, value, dict(value)))
                    value.update({key: StaleValue() for key in (*texts, StaleValue())})


def _fill(value: dict[Any, Any], content: dict[Any, Any]) -> None:
    value.clear()
    value.update(content)


def _different(value: Any) -> Any:
    """Return the other bool for a bool, another string for a string, a ``ChangingNumber`` for a number, else a ``StaleValue``."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return ChangingNumber(value)
    return f"{value} " if isinstance(value, str) else StaleValue()
