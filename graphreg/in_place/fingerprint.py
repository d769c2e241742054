"""``Fingerprint`` tells whether a model is still as it was when a graph was traced.

Compared are all modules with their registries; the plain containers that a forward can reach, with all their items; classes and the
functions that they define; and of other objects, such as a configuration or a Trainer, what the trace read (``reads.py``).

There are two comparisons. ``_ModelWatch`` compares identities, with C functions only, because each call does it. Only if an identity has
changed, the model is described once more, and the two descriptions are compared: a new number that equals the old one, or a wrapper of
activation checkpointing around a block, is no change. No comparison runs code of the user.
"""

from __future__ import annotations

import array
import enum
import functools
import itertools
import operator
import threading
import types
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from graphreg.blocks.block import is_sharded
from graphreg.blocks.placed_block import is_placed, unwrapped_block
from graphreg.ir.module_record import ORIGINAL, PREFIX, RESTS
from graphreg.torch_internals.autograd import version_of
from graphreg.torch_internals.checkpointing import WRAPPED_MODULE
from graphreg.torch_internals.dynamo import tensor_guard
from graphreg.torch_internals.functorch import without_transforms
from graphreg.torch_internals.modules import COMPILED_CALL, OWN_ATTRIBUTES
from graphreg.torch_internals.torch_modes import without_functions, without_modes
from graphreg.tracing.reads import WHOLE, Reads, reads_by_itself
from graphreg.tracing.side_effects.reachable_state import VIEWS, inside, is_foreign_class, is_installed, is_own, slots
from graphreg.tracing.side_effects.state_places import NOTHING, content, own_attributes

_Getter = Callable[[Any], Any]
_REGISTRIES = ("_modules", "_parameters", "_buffers")
_registries_of = operator.itemgetter(*_REGISTRIES)
_FUNCTION = ("__code__", "__defaults__", "__kwdefaults__")
_parts_of_function = operator.attrgetter(*_FUNCTION)
_parts_of_partial = operator.attrgetter("func", "args", "keywords")
_factory_of: _Getter = defaultdict.__dict__["default_factory"].__get__
_flat = itertools.chain.from_iterable
_has_none_of: Callable[[Any, frozenset[str]], bool] = type({}.keys()).isdisjoint
_FORWARD = "forward"
_CHECKPOINTS = "gradient_checkpointing"  # always compared: torch's and transformers' own code reads it
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
_EXACT = frozenset((bool, int, str, bytes, type(None)))  # of these, two values of one type are the same if they are equal
_ARRAYS = (bytearray, array.array, memoryview)
_CONTAINERS = (list, tuple, set, frozenset, deque, dict)
_FIXED = (tuple, frozenset, torch.Size)  # whose items cannot change, so that their identity says enough
_LARGE = 1 << 16
_GUARDS = 4  # for each set of tensors: a guard holds in one kind of autocast, and for one choice of frozen parameters
_OF_OBJECTS = frozenset(dir(object))


class Fingerprint:
    """What a graph was traced from. To make one takes milliseconds; a call of ``same`` takes less than a microsecond for each module."""

    def __init__(
        self, model: nn.Module, reads: Reads, live: Collection[Tensor] = (), opaque: Iterable[str] = (), of_opaque: Iterable[str] = (),
    ) -> None:  # fmt: skip
        """Describe the model.

        Args:
            model: The model.
            reads: What the trace read.
            live: The tensors that the graph reads at each call. The trace may have read the content of other tensors.
            opaque: The paths of the modules whose own code runs at each call.
            of_opaque: The names of attributes that opaque modules change. They alone read these, at each call.
        """
        self._model, self._reads = weakref.ref(model), reads
        self._opaque, self._of_opaque = frozenset(opaque), frozenset(of_opaque)
        self._live = {id(tensor): tensor for tensor in live}
        self._now = self._watch(model)
        self._then = self._now.description
        self._other: _ModelWatch | None = None  # the last state of the model that is not the one at the trace

    def _watch(self, model: nn.Module) -> _ModelWatch:
        """Describe the present state, also within a tracer or a transform, which would otherwise see how contents of tensors are read."""
        with without_transforms(), without_functions(), without_modes():
            return _ModelWatch(model, self._reads, self._live, self._opaque, self._of_opaque)

    def same(self) -> bool:
        """Whether the model is as it was at the trace."""
        if self._now.holds():
            return True
        # A model may change back and forth between two states.
        if self._other is not None and self._other.holds():
            return False
        model = self._model()
        if model is None:
            return False
        present = self._watch(model)
        # Other objects, such as a configuration that was loaded again, may say the same.
        if present.description == self._then:
            self._now = present
            return True
        self._other = present
        return False

    def names(self) -> set[str]:
        """Return the names of all attributes that the trace read."""
        return self._reads.names()

    def changed(self) -> str:
        """Describe the first change of the model that is found, for a log message; ``""`` if the model has not changed."""
        model = self._model()
        then, now = self._then, [] if model is None else self._watch(model).description
        first = next((i for i, (a, b) in enumerate(itertools.zip_longest(then, now)) if a != b), None)
        return "" if first is None else (then if len(then) >= len(now) else now)[first][0]


class _ModelWatch:
    """A state of a model: a description of it, and all that shows that the model is still in this state.

    Attributes:
        description: Pairs of a name, for messages, and something that can be compared: an id, a number, a type.
    """

    def __init__(
        self, model: nn.Module, reads: Reads, live: Mapping[int, Tensor], opaque: frozenset[str], of_opaque: frozenset[str]
    ) -> None:
        self._reads, self._live, self._of_opaque = reads, live, of_opaque
        outer = [module for path, module in model.named_modules() if path in opaque] if opaque else []
        self._opaque = {id(module) for each in outer for module in each.modules()}
        self.description: list[tuple[str, Any]] = []
        self._described: dict[int, Any] = {}  # by id, all that was described; it also keeps these objects alive
        self._numbers: dict[int, int] = {}  # the number of each registered tensor, by id: those that are tied have one number
        self._classes: dict[type, None] = {}
        self._waiting: deque[tuple[str, Any]] = deque()
        # What ``holds`` compares: what these getters give now, one object or several, for each of their owners.
        self._singles: defaultdict[_Getter, list[Any]] = defaultdict(list)
        self._several: defaultdict[_Getter, list[Any]] = defaultdict(list)
        self._getters: dict[tuple[Any, ...], _Getter] = {}  # by names, so that modules of one class share one getter
        self._modules: list[nn.Module] = []
        self._named: list[dict[str, Any]] = []  # the registries that are not empty
        self._holding: list[Iterable[Any]] = []  # of those that hold tensors, views of their values
        self._empty: list[dict[str, Any]] = []  # empty registries, and dicts of functions without attributes
        self._sized: list[Any] = []
        self._equal: list[tuple[_Getter, Any, Any]] = []  # what a getter gives for its owner is compared with ==
        self._spaces: list[Iterable[str]] = []  # views of the names in a dict
        self._absent: list[frozenset[str]] = []  # for each of these, names that it has not
        self._tensors: list[Tensor] = []  # those outside of registries

        code = reads.code
        self._mentioned = {_FORWARD} | code.mentioned | reads.names()
        for path, module in list(model.named_modules()):
            self._add_module(path, module, is_root=module is model)
        for space, names in code.variables.values():
            if not is_installed(space.get("__file__")):
                self._add_items(space, sorted(name for name in names if name in space))
        for function in code.functions.values():
            if not is_installed(function.__code__.co_filename):
                self._add(f"the function {function.__qualname__}", function)
        for kind in code.classes:
            if is_own(kind):
                self._add_class(kind)
        for root in reads.roots:
            if not issubclass(type(root), type):
                self._add(f"an argument, of class {type(root).__name__}", root)
        while self._waiting:
            self._enter(*self._waiting.popleft())
        self._equal.append((_default_dtype, None, _default_dtype(None)))  # that of the constants that the forward makes
        self._say("the default dtype", _default_dtype(None))
        self._note()

    # What is compared at each call

    def _note(self) -> None:
        """Note the present state: all that ``holds`` compares."""
        self._types = list(map(type, self._modules))
        self._sizes = list(map(len, self._sized))
        self._names = [*_flat(self._named)]
        self._objects = [*self._objects_now()]
        self._registered = [*_flat(self._holding)]
        # with those that containers hold: ``dict(self.named_parameters())``
        self._ties = _ties([*self._registered, *self._tensors])
        self._distinct = [i for i, tensor in enumerate(self._registered) if self._ties[i] == i and tensor is not None]
        self._guarded = [self._registered[i] for i in self._distinct]
        self._forms = _forms(self._registered)
        self._guards: list[Callable[..., bool]] = []
        self._add_guard()
        self._more_forms = _forms(self._tensors)

    def _add_guard(self) -> None:
        if len(self._guards) < _GUARDS and (guard := tensor_guard(self._guarded)) is not None:
            self._guards.append(guard)

    def _objects_now(self) -> Iterator[Any]:
        singles = _flat(map(map, self._singles, self._singles.values()))
        several = _flat(_flat(map(map, self._several, self._several.values())))
        return itertools.chain(singles, several)

    def holds(self) -> bool:
        """Whether the model is still in this state. Each call runs this: the loops are C functions, and none of them calls a method.

        The registries of all modules are among the objects compared first. So the views of registries, which were made once, show what is
        in the registries of now. Their sizes, names and values together are all that is in them; the names also show the order. An
        attribute that was absent is still absent if the names of the module's dict contain none such.
        """
        try:
            if any(self._empty) or list(map(len, self._sized)) != self._sizes or list(map(type, self._modules)) != self._types:
                return False
            if not self._same_objects() or [*_flat(self._named)] != self._names:
                return False
            if not all(map(_has_none_of, self._spaces, self._absent)) or not self._same_tensors([*_flat(self._holding)]):
                return False
            if self._tensors and _forms(self._tensors) != self._more_forms:
                return False
            return all([get(owner) == then for get, owner, then in self._equal])  # noqa: C419  # a generator takes longer
        except (LookupError, AttributeError, RuntimeError):  # something was deleted; or another thread is changing a container
            return False

    def _same_tensors(self, tensors: list[Any]) -> bool:
        """Whether the registered tensors are those noted, or others with the same ties and forms, which then are noted."""
        if not all(map(operator.is_, tensors, self._registered)):
            if _ties([*tensors, *self._tensors]) != self._ties or _forms(tensors) != self._forms:
                return False
            self._registered, self._guarded = tensors, [tensors[i] for i in self._distinct]
            return True
        guarded = self._guarded
        if not any([guard(*guarded) for guard in self._guards]):  # noqa: C419  # as above
            if _forms(tensors) != self._forms:
                return False
            self._add_guard()
        return True

    def _same_objects(self) -> bool:
        """Whether these are the objects noted, or plain values equal to them. Such values are noted, to be the same next time."""
        if all(map(operator.is_, self._objects_now(), self._objects)):
            return True
        objects = [*self._objects_now()]
        if len(objects) != len(self._objects):  # another thread is changing a container
            return False
        for i, (now, then) in enumerate(zip(objects, self._objects, strict=True)):
            if now is not then:
                if not (_is_plain(now) and _is_plain(then) and _plain(now) == _plain(then)):
                    return False
                self._objects[i] = now
        return True

    # The description

    def _say(self, name: str, what: Any) -> None:
        self.description.append((name, what))

    def _add_module(self, path: str, module: nn.Module, is_root: bool = False, is_registered: bool = True) -> None:
        """Add a module. ``is_registered``: whether it is one of the model's."""
        if id(module) in self._described or unwrapped_block(module) is not module:  # wrappers come and go around a block
            return
        if isinstance(module, torch.jit.ScriptModule):  # it is new here, and the next trace refuses it
            return
        space, label = vars(module), path.replace(f".{WRAPPED_MODULE}", "") or "the model"
        self._described[id(module)] = module
        self._watch_module(module, space)
        kind = _own_class(module)
        self._say(f"the class of {label}", id(kind))
        self._add_class(kind)
        for name, child in space["_modules"].items():
            self._say(f"submodules of {label}", (name, None if child is None else id(unwrapped_block(child))))
        if is_root:  # the graph has its own dict of the model's children, and shares the model's other two registries
            self._say(f"registries of {label}", tuple(id(space[registry]) for registry in _REGISTRIES[1:]))
        for registry in _REGISTRIES[1:]:
            for name, tensor in space[registry].items():
                number = None if tensor is None else self._numbers.setdefault(id(tensor), len(self._numbers))
                self._say(f"parameters and buffers of {label}: {name}", (name, number, _form(tensor)))
        if not is_root:
            self._say(f"the forward of {label}", id(None if is_placed(module) else space.get(_FORWARD)))
            if _FORWARD in space:
                self._singles[self._getter((_FORWARD,))].append(space)
        # the graph follows the modes of the model's modules, and ``refuse_hooks`` their hooks
        own = frozenset() if is_registered else OWN_ATTRIBUTES - {*_REGISTRIES}
        of_opaque = {name.removeprefix(f"self.{path}.") for name in self._of_opaque}
        left_out, absent = (OWN_ATTRIBUTES | {_FORWARD, COMPILED_CALL}) - own | of_opaque, set() if is_root else {_FORWARD} - space.keys()
        self._add_attributes(module, space, left_out, ({_CHECKPOINTS} | own) & space.keys(), absent)

    def _watch_module(self, module: nn.Module, space: dict[str, Any]) -> None:
        self._modules.append(module)
        for registry in _registries_of(space):
            (self._named if registry else self._empty).append(registry)
            if registry:
                self._sized.append(registry)
                owners = self._several[iter] if registry is space["_modules"] else self._holding
                owners.append(registry.values())

    def _getter(self, names: tuple[Any, ...]) -> _Getter:
        return self._getters.setdefault(names, operator.itemgetter(*names))

    def _add_attributes(self, owner: Any, space: dict[str, Any], left_out: frozenset[str], always: set[str], never: set[str]) -> None:
        """Add those attributes of a module or an object that the trace read.

        ``always``: names that count as read. ``never``: names that are absent, and shall be noticed when they appear.
        """
        read = self._reads.of(owner)
        names = (read | always) - left_out - {WHOLE}
        by_itself = reads_by_itself(type(owner))
        if WHOLE in read or by_itself:
            names_of = functools.partial(_attribute_names, left_out)
            self._equal.append((names_of, space, shown := names_of(space)))
            self._say(f"attributes of {type(owner).__name__}", tuple(shown))
            names |= {*shown}
        # What opaque code writes cannot change the graph either: the trace would have refused it.
        counted = self._reads.counts(owner)
        if id(owner) in self._opaque or (self._opaque and not issubclass(type(owner), nn.Module)):
            counted |= {name for name in self._reads.written(owner) & names if _is_plain(space.get(name))}
        names = frozenset(name for name in names - counted if not name.startswith(PREFIX)) - _OF_OBJECTS
        self._add_items(space, sorted(names & space.keys()), _REGISTRIES if issubclass(type(owner), nn.Module) else ())
        in_slots = {name: slot for name in names - space.keys() if (slot := _slot(type(owner), name)) is not None}
        in_slots |= slots(type(owner)) if by_itself or WHOLE in read else {}
        for name, slot in sorted(in_slots.items()):
            self._single(functools.partial(_of_slot, slot), owner, f"values of {name!r}")
        absent = names - space.keys() - in_slots.keys()
        if absent or never:
            self._spaces.append(space.keys())
            self._absent.append(absent | never)
        if absent:
            self._say(f"values of {min(absent)!r}", tuple(sorted(absent)))

    def _add_items(self, space: Any, names: Collection[Any], compared: tuple[str, ...] = ()) -> None:
        """Add items of a dict. Those of ``compared`` are compared by identity and not described."""
        if all_names := (*compared, *names):
            (self._singles if len(all_names) == 1 else self._several)[self._getter(all_names)].append(space)
        for name in names:
            self._add(f"values of {name!r}", space[name])

    def _single(self, get: _Getter, owner: Any, label: str) -> None:
        self._singles[get].append(owner)
        self._add(label, get(owner))

    def _add_function(self, function: types.FunctionType) -> None:
        """Add a function's code, its defaults and the variables of the functions around it."""
        self._several[_parts_of_function].append(function)
        for part in _FUNCTION:
            self._add(f"{part} of {function.__qualname__}", getattr(function, part))
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            if id(cell) not in self._described:
                self._described[id(cell)] = cell
                self._single(content, cell, f"values of {name!r}")

        if vars(function):
            self._add(f"attributes of {function.__qualname__}", vars(function))
        else:
            self._empty.append(vars(function))

    def _add_class(self, kind: type) -> None:
        """Add a class and its bases: the members whose names code mentions or reads, and special methods."""
        for base in kind.__mro__:
            if base in (nn.Module, object) or base.__module__ in ("typing", "abc", "builtins") or base in self._classes:
                continue
            self._classes[base] = None
            members = vars(base)
            names = list[str]()
            for name, value in list(members.items()):
                is_special = name.startswith("__") and name.endswith("__")
                is_data = _is_plain(value) or issubclass(type(value), _CONTAINERS)
                # Python calls special methods by itself (``__call__``, ``__len__``), so no code
                # needs to mention them
                if name in self._mentioned or (is_special and not is_data):
                    names.append(name)
            self._sized.append(members)
            self._say(f"the class {base.__name__}", (id(base), tuple(names)))
            self._add_items(members, names)

    def _add(self, name: str, value: Any) -> None:
        """Add a value to the description, and what is in it to what waits to be described."""
        kind = type(value)
        if _is_plain(value):
            self._say(name, _plain(value))
        elif issubclass(kind, Tensor):
            self._tensors.append(value)
            self._described[id(value)] = value
            registered = id(value) in self._numbers
            # A registered tensor may be replaced by one of the same form, so its number counts and
            # not its id.
            self._say(name, (self._numbers[id(value)] if registered else id(value), _form(value)))
            if not registered and id(value) not in self._live:
                self._equal.append((_version, value, _version(value)))
                self._say(name, _content_of(value))
        elif issubclass(kind, _ARRAYS) or _is_array(kind):
            self._described[id(value)] = value
            self._equal.append((_array, value, _array(value)))
            self._say(name, _array(value))
        elif issubclass(kind, types.MethodType):
            self._described[id(value)] = value
            # Python makes a new bound method at each access.
            self._say(name, (kind, id(value.__func__)))
            self._add(name, value.__self__)
        elif issubclass(kind, types.BuiltinFunctionType) and self._reads.knows(value.__self__):  # such as ``table.get``
            self._described[id(value)] = value
            self._say(name, (kind, value.__name__))
            self._add(name, value.__self__)
        elif issubclass(kind, (*_CONTAINERS, functools.partial, types.SimpleNamespace)):
            if id(value) in self._described:
                self._say(name, (kind, "seen"))
                return
            self._described[id(value)] = value
            self._say(name, kind)
            self._waiting.append((name, value))
        else:
            self._say(name, id(value))
            if id(value) not in self._described and value is not None:
                self._described[id(value)] = value
                self._waiting.append((name, value))

    def _enter(self, name: str, value: Any) -> None:
        """Describe what is in a container or an object."""
        kind = type(value)
        if issubclass(kind, nn.Module):  # one that is in a container of the model, and not among its submodules
            # ``_add_module`` passes over what was described.
            del self._described[id(value)]
            for path, inner in list(value.named_modules()):
                self._add_module(f"{name} {path}".rstrip(), inner, is_registered=False)
            return
        if issubclass(kind, type):
            if not is_foreign_class(value):
                self._add_class(value)
            return
        if kind is types.FunctionType:
            if is_own(value):
                self._add_function(value)
            return
        if kind is types.MappingProxyType or kind in VIEWS:
            for each in inside(value):
                self._add(name, each)
        if issubclass(kind, weakref.ref):
            self._single(weakref.ref.__call__, value, name)
        elif kind is ContextVar:
            self._single(_current, value, name)
        elif issubclass(kind, threading.local):
            self._equal.append((_of_thread, value, shown := _of_thread(value)))
            self._say(name, shown)
            return
        if issubclass(kind, functools.partial):
            for part in (value.func, value.args):
                self._add(name, part)
            self._several[_parts_of_partial].append(value)
            self._add(name, value.keywords)
        elif issubclass(kind, types.SimpleNamespace):
            self._add_contents(name, own_attributes(value))
        elif issubclass(kind, _CONTAINERS):
            self._add_contents(name, value)
        if issubclass(kind, defaultdict):
            self._single(_factory_of, value, f"the default_factory of {name}")
        if not self._reads.knows(value):
            return
        if kind not in _CONTAINERS and not is_foreign_class(kind):
            self._add_class(kind)
            self._say(name, id(kind))
            self._singles[type].append(value)
        space = own_attributes(value) or {}
        if self._reads.records(kind):
            self._add_attributes(value, space, frozenset(), set(), set())
        elif space:
            self._add_contents(name, space)

    def _add_contents(self, name: str, value: Any) -> None:
        """Add the items of a container."""
        kind, items = type(value), inside(value)
        self._say(name, len(items))
        if kind not in _FIXED:
            self._sized.append(value)
        if issubclass(kind, dict):
            base: Any = OrderedDict if issubclass(kind, OrderedDict) else dict
            self._several[iter] += [base.keys(value), base.values(value)]
        elif items and kind not in _FIXED:
            base = next(each for each in _CONTAINERS if issubclass(kind, each))
            self._several[base.__iter__].append(value)
        kinds = set(map(type, items))
        if issubclass(kind, (set, frozenset)):
            plain = [each for each in items if _is_plain(each)]
            self._say(name, frozenset(map(_plain, plain)))
            items = sorted((each for each in items if not _is_plain(each)), key=id)
        if kinds == {float}:
            self._say(name, array.array("d", items).tobytes())
        elif kinds <= _EXACT and len(kinds) == 1:
            self._say(name, (*kinds, items))
        else:
            for item in items:
                self._add(name, item)


def _attribute_names(left_out: frozenset[str], space: dict[str, Any]) -> list[str]:
    return [name for name in space if name not in left_out and not name.startswith(PREFIX)]


def _forms(tensors: list[Any]) -> tuple[list[Any], ...]:
    """Return shapes, dtypes and devices. A device is written as its number and whether it is meta, which are quick to compare."""
    present = [tensor for tensor in tensors if tensor is not None]
    try:
        shapes: list[Any] = [tensor.shape for tensor in present]
    except RuntimeError:  # a parameter that is not initialized yet has no shape
        shapes = [None if nn.parameter.is_lazy(tensor) else tensor.shape for tensor in present]
    dtypes, devices = [tensor.dtype for tensor in present], [tensor.get_device() for tensor in present]
    return shapes, dtypes, devices, [tensor.is_meta for tensor in present], [tensor is None for tensor in tensors]


def _form(tensor: Any) -> Any:
    """Return the shape, dtype and device of a tensor; None for None."""
    return None if tensor is None else (None if nn.parameter.is_lazy(tensor) else tuple(tensor.shape), tensor.dtype, str(tensor.device))


def _ties(tensors: list[Any]) -> list[int]:
    """Return, for each tensor, the position at which it comes first."""
    first: dict[int, int] = {}
    return [first.setdefault(id(tensor), i) for i, tensor in enumerate(tensors)]


def _own_class(module: nn.Module) -> type:
    """Return a module's class, as it is without graphreg and FSDP2."""
    kind: type = type(module)
    while True:
        if (own := vars(kind).get(ORIGINAL) or vars(kind).get(RESTS)) is not None:
            kind = own
        elif any(base.__name__ == "FSDPModule" for base in kind.__bases__) and is_sharded(module):
            kind = kind.__bases__[-1]
        else:
            return kind


def _is_plain(value: Any) -> bool:
    return issubclass(type(value), _PLAIN) and not issubclass(type(value), enum.Enum)


def _plain(value: Any) -> Any:
    """Return what tells a plain value from all others: also 1 from True, and 0.0 from -0.0."""
    kind = type(value)
    if kind in _EXACT:
        return kind, value
    if issubclass(kind, float):
        return kind, float.__repr__(value)
    if issubclass(kind, complex):
        return kind, complex.__repr__(value)
    if issubclass(kind, int):
        return kind, int.__repr__(value)
    return kind, str.__str__(value) if issubclass(kind, str) else repr(value)


def _is_array(kind: type) -> bool:
    return any(base.__module__ == "numpy" and base.__name__ == "ndarray" for base in kind.__mro__)


def _array(value: Any) -> Any:
    if not _is_array(type(value)):
        return type(value), bytes(value)
    plain = value.view(type(value).__mro__[-2]) if value.dtype.hasobject else value
    return str(plain.dtype), plain.shape, [*map(id, plain.ravel().tolist())] if plain.dtype.hasobject else plain.tobytes()


def _version(tensor: Tensor) -> Any:
    """Return what changes when an operation of torch writes into a tensor."""
    return version_of(tensor), tensor.data_ptr() if _has_data(tensor) else 0


def _content_of(tensor: Tensor) -> Any:
    """Return the content of a tensor. A large one counts as changed as soon as something writes into it."""
    if tensor.numel() > _LARGE:
        return _version(tensor)
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes() if _has_data(tensor) else None


def _has_data(tensor: Tensor) -> bool:
    plain = type(tensor) is Tensor and tensor.layout is torch.strided and not tensor.is_quantized
    return plain and tensor.device.type != "meta" and not tensor.is_conj() and not tensor.is_neg() and bool(tensor.numel())


def _slot(kind: type, name: str) -> Any:
    found = next((vars(base)[name] for base in kind.__mro__ if name in vars(base)), None)
    return found if type(found) is types.MemberDescriptorType else None


def _of_slot(slot: Any, owner: Any) -> Any:
    try:
        return slot.__get__(owner)
    except AttributeError:
        return NOTHING


def _default_dtype(_: None) -> torch.dtype:
    return torch.get_default_dtype()


def _current(variable: ContextVar[Any]) -> Any:
    return variable.get(NOTHING)


def _of_thread(value: threading.local) -> dict[str, Any]:
    """Return the attributes that an object has in this thread."""
    return {name: _plain(each) if _is_plain(each) else id(each) for name, each in vars(value).items()}
