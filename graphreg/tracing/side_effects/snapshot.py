"""Snapshots of the state that a forward may change: attributes, variables, lists, arrays, counters, default arguments.

A trace runs the forward, which changes this state. The graph will not change it, and tracing must
leave the model as it was, so the state is restored. Before it is restored, a second trace may start
from the state that the first trace left behind. If the two graphs differ, the first one would be
wrong from the second call on.
"""

from __future__ import annotations

import array
import functools
import sys
import threading
import types
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from graphreg.torch_internals.global_state import GlobalState
from graphreg.torch_internals.modules import OWN_ATTRIBUTES, REGISTERED, modules_by_path
from graphreg.torch_internals.torch_modes import without_functions
from graphreg.tracing.side_effects.iterators import (
    ByteArray,
    ContextVariable,
    IteratorPosition,
    RandomGenerator,
    copied_iterator,
    is_iterator,
    is_random_generator,
)
from graphreg.tracing.side_effects.reachable_state import ReachableCode, code_of, is_entered, is_foreign_class, is_installed, reachable_code
from graphreg.tracing.side_effects.stand_ins import StaleValue
from graphreg.tracing.side_effects.state_places import (
    NOTHING,
    OBJECTS,
    PLAIN,
    Attributes,
    Cells,
    Container,
    Defaults,
    FunctionCache,
    Items,
    Memory,
    ParameterState,
    Slots,
    StatePlace,
    Variables,
    is_same,
    own_attributes,
)

# to look up exact types, which is quick: a model may have tables of thousands of numbers
_NUMBERS_AND_TEXT = frozenset(PLAIN)
_CONTAINERS = frozenset((OrderedDict, dict, list, set, deque))
_OF_GRADIENTS = frozenset(("backward", "grad", "zero_grad", "step", "clip_grad_norm_", "clip_grad_value_"))  # code that may write into them
_LONG = 200  # from so many characters on, a name is shortened: a chain may have thousands of objects
_IMMUTABLE = 1 << 8  # CPython's Py_TPFLAGS_IMMUTABLETYPE, which classes made in C have: no code can set their attributes
_NOT_ENTERED = (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, types.MethodType)


class _Assignments(threading.local):
    # the attributes of modules that forwards have assigned; None outside of ``assignments_noted``
    assigned: dict[str, None] | None = None


_thread = _Assignments()


@contextmanager
def assignments_noted() -> Iterator[dict[str, None]]:
    """Within the context, note the names of the attributes of modules that traced forwards assign, such as ``self.last``."""
    before, _thread.assigned = _thread.assigned, {}
    try:
        yield _thread.assigned
    finally:
        _thread.assigned = before


class Snapshot:
    """The state that a model, and everything else that its code can reach, has before the forward runs.

    Attributes:
        places: Everything that the forward may change.
        parameters: Those of the places that are parameters.
        irreversible: A dict of state that cannot be restored, such as the position of a Python
            generator. Each key is the full name of the state; the value is the name of the
            attribute or variable that holds it, or ``""``.
        code: What the model's code can reach.
        torchs: torch's global state, such as grad mode.
    """

    def __init__(self, model: nn.Module) -> None:
        """Take the snapshot."""
        self.torchs = GlobalState()
        self.places: list[StatePlace] = []
        self.parameters: list[ParameterState] = []
        self._of_optimizers: dict[str, torch.Tensor] = {}
        self.irreversible: dict[str, str] = {}
        self._has_positions = False  # of iterators
        self._seen: set[int] = set()
        self._found_same = False  # whether ``registered`` has just found nothing changed
        self._prepared: list[StatePlace] = []  # the places that ``changed`` has prepared for another trace
        self._found: list[StatePlace] = []  # what ``_differing`` has found, or []: nothing differs after ``restore``
        self._holds = False  # whether it still holds, see ``nothing_ran``
        # (place in ``places``, container, what holds it, key) of each empty one
        self._empty: list[tuple[int, Any, Attributes, str]] = []
        # no graph calls a module of torch.jit, and its state is out of Python's reach
        named = [each for each in modules_by_path(model, once=True).items() if not isinstance(each[1], torch.jit.ScriptModule)]
        self._modules = [module for _, module in named]
        self._paths = [f"self.{path}" if path else "self" for path, _ in named]
        self._registered = [(m, [(name, dict(vars(m)[name]) if vars(m)[name] else {}) for name in REGISTERED]) for m in self._modules]
        self._waiting = deque[tuple[Any, str, int, Attributes | None, str]]()  # the arguments of ``_add``
        self.code = code_of(self._modules)
        for path, module in zip(self._paths, self._modules, strict=True):
            self._add_attributes(Attributes(module, path), 2)
        # neither modes nor subclasses are to see that their attributes are read
        with without_functions():
            for path, (_, registered) in zip(self._paths, self._registered, strict=True):
                for name, value in registered[0][1].items():
                    if isinstance(value, torch.Tensor) and id(value) not in self._seen:
                        self._add_parameter(value, f"{path}.{name}")
        kinds = [each for kind in dict.fromkeys(map(type, self._modules)) for each in kind.__mro__ if not is_foreign_class(each)]
        for each in dict.fromkeys([*kinds, *self.code.classes]):
            self._add_class(each)
        self._add_reachable(self.code)

    def follow_imports(self) -> None:
        """Add the state of Python modules that have been imported meanwhile, as it is now."""
        before, self.code = self.code, reachable_code(self._modules)
        for each in self.code.classes:
            self._add_class(each)
        # only the variables of new namespaces: in others, stand-ins may be in the places of functions now
        new = {key: (space, names) for key, (space, names) in self.code.variables.items() if key not in before.variables}
        self._add_reachable(
            replace(
                self.code,
                caches={key: each for key, each in self.code.caches.items() if key not in before.caches},
                functions={key: each for key, each in self.code.functions.items() if key not in before.functions},
                variables={
                    key: (space, {name for name in names if name in space and not callable(space.get(name))})
                    for key, (space, names) in new.items()
                },
            )
        )

    def _add_reachable(self, code: ReachableCode) -> None:
        """Add global variables, closures, default arguments, attributes and caches of functions."""
        self.places += [FunctionCache(cache, "a cache") for cache in code.caches.values()]
        for space, names in code.variables.values():
            self._add_attributes(Variables(space, frozenset(names)), 2, not is_installed(space.get("__file__", "")))
            # by ``get``, since the trace of another thread may take its stand-ins out of the namespace
            if any(_draws_from_numpy(space.get(name)) for name in names):
                # it is the value of no variable of the user's, and so would not be found
                self._add_value(sys.modules["numpy"].random.mtrand._rand, "numpy.random", 0)
        for function in code.functions.values():
            self._add_defaults(function, f"{function.__module__}.{function.__qualname__}")
            if vars(function):
                self._add_attributes(Attributes(function, function.__qualname__), 1)
            else:  # as most have
                self._empty.append((len(self.places), vars(function), Attributes(function, function.__qualname__), ""))
            if function.__closure__:
                self._add_attributes(Cells(function), 2, not is_installed(function.__code__.co_filename))
        while self._waiting:
            self._add(*self._waiting.popleft())

    def _add_attributes(self, place: Attributes, depth: int, by_name: bool = True) -> None:
        """Add attributes or variables, and what they lead to: ``depth`` levels of objects, and ``by_name`` all that the code mentions."""
        self._seen.add(id(place.owner))
        self.places.append(place)
        apart = REGISTERED if issubclass(type(place.owner), nn.Module) else ()
        for key, value in place.content.items():
            kind = type(value)
            if kind in _NUMBERS_AND_TEXT or kind is bool or key in apart:
                continue
            # a module has twelve of these, of which a forward changes none
            if kind in _CONTAINERS and not value:
                if id(value) not in self._seen:
                    self._seen.add(id(value))
                    self._empty.append((len(self.places), value, place, key))
                continue
            self._add_value(value, place.label(key), max(depth, by_name and key in self.code.mentioned), place, key)

    def _add_parameter(self, parameter: torch.Tensor, name: str) -> None:
        """Add a parameter, its gradient and its attributes."""
        # a trace notices no write into a gradient
        place = ParameterState(parameter, name, not _OF_GRADIENTS.isdisjoint(self.code.mentioned))
        self.parameters.append(place)
        self._add_attributes(place, 2)

    def _add_class(self, kind: type) -> None:
        """Add the attributes of a class and the default arguments of its methods."""
        if id(kind) in self._seen or kind.__flags__ & _IMMUTABLE:
            return
        self._seen.add(id(kind))
        self.places.append(place := Attributes(kind, kind.__name__))
        for name, value in place.content.items():
            function = _unwrapped(value)
            if issubclass(type(function), types.FunctionType):
                self._add_defaults(function, f"{kind.__name__}.{name}")
            elif not issubclass(type(value), type):
                # deep enough for an object that all instances share, or a member of an enum
                self._add_value(value, f"{kind.__name__}.{name}", 1, place, name)

    def _add_defaults(self, function: types.FunctionType, name: str) -> None:
        """Add the default arguments of a function."""
        if function.__defaults__ or function.__kwdefaults__:
            place = Defaults(function, f"a default argument of {name}")
            for key, value in place.content.items():
                self._add_value(value, place.name, 1, place, key)
            self.places.append(place)

    def _add_value(self, value: Any, name: str, depth: int, holder: Attributes | None = None, key: str = "") -> None:
        """Add a value later: they may be nested at any depth. The arguments are those of ``_add``."""
        name = name if len(name) <= _LONG else f"{name[: _LONG // 2]}...{name[-_LONG // 4 :]}"
        self._waiting.append((value, name, depth, holder, key))

    def _add(self, value: Any, name: str, depth: int, holder: Attributes | None, key: str) -> None:
        """Add a value if its content can change, and the values in it.

        Args:
            value: The value.
            name: The name of the value, for errors.
            depth: How many levels of nested objects to look into, but for those whose names the code mentions.
            holder: The place that has the value as an attribute or variable, if there is one.
            key: The name of that attribute or variable.
        """
        # a method of an object keeps that alive, and a partial its arguments
        if issubclass(type(value), types.MethodType):
            self._add_value(value.__self__, name, depth)
        elif issubclass(type(value), functools.partial):
            self._add_value(value.args, name, depth)
            self._add_value(value.keywords, name, depth)

        if type(value) is StaleValue or issubclass(type(value), PLAIN) or id(value) in self._seen or issubclass(type(value), _NOT_ENTERED):
            return
        self._seen.add(id(value))

        if issubclass(type(value), (list, dict, set, deque)):
            self.places.append(Items(value, name) if issubclass(type(value), dict) else Container(value, name, holder, key))
        if issubclass(type(value), (list, tuple, dict, deque)):
            for item in list(dict.values(value) if issubclass(type(value), dict) else value):
                if type(item) not in _NUMBERS_AND_TEXT:
                    self._add_value(item, name, depth)
        elif issubclass(type(value), nn.Parameter):
            with without_functions():
                self._add_parameter(value, name)
        elif type(value) is torch.Tensor or (type(value).__module__ == "numpy" and hasattr(value, "tobytes") and hasattr(value, "flags")):
            self.places.append(Memory(value, name))
        elif issubclass(type(value), (bytearray, array.array)):
            self.places.append(ByteArray(value, name, holder, key))
        elif issubclass(type(value), ContextVar) and value.get(NOTHING) is not NOTHING:
            # a variable that is not set yet cannot be restored
            self.places.append(ContextVariable(value, name))
        elif is_random_generator(value):
            self.places.append(RandomGenerator(value, name))
        elif is_iterator(value):
            if holder is not None and (copied := copied_iterator(value)) is not NOTHING:
                self.places.append(IteratorPosition(value, name, holder, key, copied))
                self._has_positions = True
            else:
                self.irreversible[name] = key
        elif depth and (not is_foreign_class(type(value)) or issubclass(type(value), OBJECTS)):
            self._add_object(value, name, depth - 1)

    def _add_object(self, value: Any, name: str, depth: int) -> None:
        """Add the attributes and slots of an object."""
        if issubclass(type(value), Optimizer):
            states = [each for state in value.state.values() for each in state.values() if isinstance(each, torch.Tensor)]
            self._seen.update(map(id, states))
            self._of_optimizers |= {f"tensor {i} in {name.removeprefix('self.')}": each for i, each in enumerate(states)}
        if own_attributes(value) is not None:
            self._add_attributes(Attributes(value, name), depth, is_entered(type(value)))
        if any("__slots__" in vars(kind) for kind in type(value).__mro__ if not is_foreign_class(kind)):
            self._add_attributes(Slots(value, name), depth, is_entered(type(value)))

    def watched(self) -> dict[str, torch.Tensor]:
        """Return, by name, the tensors of which the snapshot has no copy: the data of parameters, gradients, the state of optimizers.

        Who runs the forward on them puts back what it writes.
        """
        found = dict(self._of_optimizers)
        for place in self.parameters:
            found[f"the parameter {place.name.removeprefix('self.')}"] = place.data
            if place.gradient is not None:
                found[f"the gradient of {place.name.removeprefix('self.')}"] = place.gradient
        return found

    def open_containers(self, every: bool = False) -> None:
        """Add those containers to ``places`` that were empty when the snapshot was taken and are not now; with ``every``, all of them."""
        opened = [each for each in self._empty if every or each[1]]
        if not opened:
            return
        self._empty, added = [each for each in self._empty if not (every or each[1])], dict[int, list[StatePlace]]()
        for i, value, holder, key in opened:
            place: StatePlace = holder  # a function, which had no attributes
            if key:
                name = holder.label(key)
                place = Items(value, name) if issubclass(type(value), dict) else Container(value, name, holder, key)
                place.content = type(place.content)()  # as it was when the snapshot was taken
            added.setdefault(i, []).append(place)
        places = [place for i, each in enumerate(self.places) for place in (*added.get(i, ()), each)]
        self.places = [*places, *added.get(len(self.places), ())]

    def serves_again(self) -> bool:
        """Return whether ``restore`` makes the state the same in all respects, so that the snapshot also describes what comes after it."""
        return not self.irreversible and not self._has_positions

    def take_modes(self) -> Callable[[], None]:
        """Note the present modes of modules, and torch's state, in place of those noted before. Return a function that undoes this."""
        torchs, self.torchs = self.torchs, GlobalState()
        places = [place for place in self.places if issubclass(type(place.owner), nn.Module) and type(place) is Attributes]
        modules = [(place.content, vars(place.owner)) for place in places]
        before = [(content, content["training"]) for content, now in modules if "training" in content and "training" in now]
        for content, now in modules:
            if "training" in content and "training" in now:
                content["training"] = now["training"]

        def back() -> None:
            self.torchs = torchs
            for content, mode in before:
                content["training"] = mode

        return back

    def changed(self) -> list[str]:
        """Return the names of the state whose numbers, strings or items have changed, and prepare all places for another trace.

        A later call may read this state. Another trace cannot use the proxies that the last trace
        left behind. So each proxy is replaced by a ``StaleValue``, or by the content from before
        the forward.
        """
        before, self._prepared = self._prepared, self._differing()
        self._note_assigned(self._prepared)
        if not self._found_same:
            self._restore_registered()
        self._found_same = False  # another forward may run from here on
        return list(dict.fromkeys(name for place in dict.fromkeys([*self._prepared, *before]) for name in place.prepare_retrace()))

    def _differing(self) -> list[StatePlace]:
        """Return the places whose content may have changed. There are a thousand of them, and few ever change."""
        self.open_containers()
        self._found, self._holds = [place for place in self.places if not place.same()], False
        return self._found

    def nothing_ran(self) -> None:
        """Say that no forward has run since ``left``, ``changed`` or ``restore``: the next ``restore`` need not look for changes."""
        self._holds = True

    def registered(self) -> list[str]:
        """Return the names of the buffers, parameters and modules that the forward has registered or replaced."""
        changed = [
            (place, content, module.__dict__[kind])
            for (module, registered), place in zip(self._registered, self._paths, strict=True)
            for kind, content in registered
            if (content or module.__dict__[kind]) and not is_same(module.__dict__[kind], content)
        ]
        self._found_same = not changed
        return [f"{place}.{name}" for place, then, now in changed for name in {**then, **now} if now.get(name) is not then.get(name)]

    def assigned_tensors(self) -> list[str]:
        """Return the names of the attributes to which the forward assigned tensors that it made. Call ``changed`` first."""
        return [place.label(key) for place in self.places if isinstance(place, Attributes) for key in place.tensors]

    def drawn_generators(self) -> list[str]:
        """Return the names of the random generators from which the forward has drawn."""
        return [name for place in self.places if isinstance(place, RandomGenerator) for name in place.prepare_retrace()]

    def reassigned(self) -> list[str]:
        """Return the names of the attributes to which a second trace assigned tensors of other content than the first trace did."""
        return [name for place in self.places if isinstance(place, Attributes) for name in place.reassigned()]

    def mark_counters(self) -> bool:
        """Let each place mark what has changed again since ``changed`` ran (``StatePlace.mark_counters``). Return whether any has."""
        self.open_containers()
        return any([place.mark_counters() for place in list(self.places)])  # noqa: C419  # marks every place

    def left(self) -> list[str]:
        """Return the names of the state that has changed, but not of what every module has. This changes nothing."""
        names = dict.fromkeys(name for place in self._differing() for name in place.left())
        return [name for name in names if name.rpartition(".")[2] not in OWN_ATTRIBUTES]

    def note(self) -> None:
        """Note what ``mark_counters`` needs, after a forward that ran on real tensors."""
        self.open_containers()
        for place in self.places:
            place.note()

    def hide(self, paths: tuple[str, ...]) -> None:
        """Put stand-ins in place of what has changed, but for state whose name begins with one of ``paths``.

        Raises:
            TypeError: Something that has changed cannot be hidden.
        """
        self.open_containers()
        if not all([place.hide() for place in list(self.places) if not f"{place.name}.".startswith(paths)]):  # noqa: C419  # hides all
            raise TypeError("what the forward has changed cannot be hidden")

    def restore(self) -> None:
        """Restore the state from before the forward."""
        # first of all, since what follows may compute
        self.torchs.restore()
        self.put_back()

    def put_back(self, but_tables: bool = False) -> None:
        """Restore everything but torch's global state: between two calls, this has modes of the code that makes the calls.

        ``but_tables``: leave the tensors that the forward has made, those of ``assigned_tensors``, in their attributes.
        """
        holders = [place for place in self.places if isinstance(place, Attributes) and place.tensors] if but_tables else []
        with without_functions():
            differing = self._found if self._holds else self._differing()
            self._note_assigned(differing)
            self._restore_registered()
            for place in differing:
                place.restore()
            for holder in holders:
                for name, table in holder.tensors.items():
                    holder.set(name, table)
        self._found, self._holds = [], False

    def _note_assigned(self, differing: list[StatePlace]) -> None:
        """Note what the forward has assigned or put into containers: of modules of the user's classes and in their attributes."""
        if _thread.assigned is None:
            return

        noted = [place for place in differing if isinstance(place, (Attributes, Container)) and _is_within_the_model(place)]
        names = [name for place in noted for name in place.left()]
        shown = [name for name in names if not name.rpartition(".")[2].startswith("_tensor_constant")]
        _thread.assigned.update(dict.fromkeys(name for name in shown if name.rpartition(".")[2] not in OWN_ATTRIBUTES))

    def _restore_registered(self) -> None:
        """Restore parameters, buffers and submodules."""
        for module, registered in self._registered:
            for name, content in registered:
                now = module.__dict__[name]  # compared by identity, because values may be proxies
                if (now or content) and not is_same(now, content):
                    now.clear()
                    now.update(content)


def _is_within_the_model(place: StatePlace) -> bool:
    if not (place.name == "self" or place.name.startswith("self.")):
        return False
    return not (isinstance(place.owner, nn.Module) and is_foreign_class(type(place.owner)))


def _unwrapped(value: Any) -> Any:
    """Return the function inside a decorated function, as ``inspect.unwrap`` does, but without running code of the user's."""
    seen = set[int]()
    while id(value) not in seen and "__wrapped__" in (inside := own_attributes(value) or {}):
        seen.add(id(value))
        value = inside["__wrapped__"]
    return value


def _draws_from_numpy(value: Any) -> bool:
    """Return whether code can reach numpy's global random generator through a value."""
    if not is_foreign_class(type(value)) and type(value).__name__ != "cython_function_or_method":
        return False
    is_module = issubclass(type(value), types.ModuleType)
    named = value.__name__ if is_module else str(getattr(getattr(value, "__self__", None), "__module__", ""))
    return named == "numpy" or named.startswith("numpy.random")
