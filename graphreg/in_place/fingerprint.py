"""``Fingerprint`` tells whether a model is still as it was when a graph was traced.

Compared are all modules with their registries; the plain containers that a forward can reach, with all their items; classes and the
functions that they define; and of other objects, such as a configuration or a Trainer, what the trace read (``reads.py``).

There are two comparisons. ``_Watch`` compares identities, with C functions only, because each call does it. Only if an identity has
changed, the model is described once more, and the two descriptions are compared: a new number that equals the old one, or a wrapper of
activation checkpointing around a block, is no change. No comparison runs code of the user.
"""

from __future__ import annotations

import array
import enum
import functools
import itertools
import operator
import sys
import types
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from graphreg.blocks import is_placed, is_sharded, unwrapped_block
from graphreg.in_place.turns import RESTS
from graphreg.ir import ORIGINAL, PREFIX
from graphreg.torch_internals import COMPILED_CALL, tensor_guard, version_of
from graphreg.tracing import OWN_ATTRIBUTES, WHOLE, Reads, inside, is_foreign_class, is_foreign_name

_REGISTRIES = ("_modules", "_parameters", "_buffers")
_registries_of = operator.itemgetter(*_REGISTRIES)
_FORWARD = "forward"
_CHECKPOINTS = "gradient_checkpointing"  # always compared: torch's and transformers' own code reads it
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
_EXACT = frozenset((bool, int, str, bytes, type(None)))  # of these, two values of one type are the same if they are equal
_ARRAYS = (bytearray, array.array)
_CONTAINERS = (list, tuple, set, frozenset, deque, dict)
_LARGE = 1 << 16
_ABSENT = object()
_OF_OBJECTS = frozenset(dir(object))
_Getter = Callable[[Any], Any]


class Fingerprint:
    """What a graph was traced from. To make one takes milliseconds; a call of ``same`` takes less than a microsecond for each module."""

    def __init__(self, model: nn.Module, reads: Reads, live: Collection[Tensor] = ()) -> None:
        """Describe the model.

        Args:
            model: The model.
            reads: What the trace read.
            live: The tensors that the graph reads at each call. The trace may have read the content of other tensors.
        """
        self._model, self._reads = weakref.ref(model), reads
        self._live = {id(tensor): tensor for tensor in live}
        self._now = _Watch(model, reads, self._live)
        self._then = self._now.description
        self._other: _Watch | None = None  # the last state of the model that is not the one at the trace

    def same(self) -> bool:
        """Whether the model is as it was at the trace."""
        if self._now.holds():
            return True
        if self._other is not None and self._other.holds():
            return False
        model = self._model()
        if model is None:
            return False
        present = _Watch(model, self._reads, self._live)
        if present.description == self._then:
            self._now = present
            return True
        self._other = present
        return False

    def changed(self) -> str:
        """Describe the first change of the model that is found, for a log message; ``""`` if the model has not changed."""
        model = self._model()
        then, now = self._then, [] if model is None else _Watch(model, self._reads, self._live).description
        first = next((i for i, (a, b) in enumerate(itertools.zip_longest(then, now)) if a != b), None)
        return "" if first is None else (then if len(then) >= len(now) else now)[first][0]


class _Watch:
    """A state of a model: a description of it, and all that shows that the model is still in this state.

    Attributes:
        description: Pairs of a name, for messages, and something that can be compared: an id, a number, a type.
    """

    def __init__(self, model: nn.Module, reads: Reads, live: Mapping[int, Tensor]) -> None:
        self._reads, self._live = reads, live
        self.description: list[tuple[str, Any]] = []
        self._described: dict[int, Any] = {}  # by id, all that was described; it also keeps these objects alive
        self._numbers: dict[int, int] = {}  # the number of each registered tensor, by id: those that are tied have one number
        self._classes: dict[type, None] = {}
        self._waiting: deque[tuple[str, Any]] = deque()
        self._singles: list[tuple[_Getter, Any]] = []  # getters of one object each, with their arguments
        self._several: list[tuple[_Getter, Any]] = []  # getters of several objects each
        self._sized: list[Any] = []
        self._empty_spaces: list[dict[str, Any]] = []  # dicts of functions without attributes
        self._arrays: list[tuple[_Getter, Any, Any]] = []
        self._free: list[tuple[Any, frozenset[str]]] = []  # the names in a dict, and names that it has not
        self._tensors: list[Tensor] = []  # those outside of registries

        modules = list(model.named_modules())
        self._modules = [module for _, module in modules]
        code = reads.code
        self._mentioned = {_FORWARD} | code.mentioned | reads.names()
        for path, module in modules:
            self._add_module(path, module, is_root=module is model)
        for space, names in code.variables.values():
            if not _is_installed(str(space.get("__file__", ""))):
                self._add_items(space, sorted(name for name in names if name in space))
        for function in code.functions.values():
            if not _is_installed(function.__code__.co_filename):
                self._add(f"the function {function.__qualname__}", function)
        for kind in code.classes:
            if not _is_installed(str(getattr(sys.modules.get(kind.__module__), "__file__", ""))):
                self._add_class(kind)
        while self._waiting:
            self._enter(*self._waiting.popleft())
        self._note()

    # What is compared at each call

    def _note(self) -> None:
        """Note the present state: all that ``holds`` compares."""
        self._spaces = [vars(module) for module in self._modules]
        self._inner = self._spaces[1:]
        self._several.append((operator.itemgetter(*_REGISTRIES[1:]), self._spaces[0]))
        registries = self._registries()
        self._registry_sizes = list(map(len, registries))
        of_tensors = [False, True, True] * len(self._spaces)
        self._filled = [*map(bool, registries)]
        self._holding = [bool(registry) and tensors for registry, tensors in zip(registries, of_tensors, strict=True)]
        self._parents = [bool(registry) and not tensors for registry, tensors in zip(registries, of_tensors, strict=True)]
        self._types = list(map(type, self._modules))
        self._names = [*itertools.chain.from_iterable(itertools.compress(registries, self._filled))]
        self._children = _values(itertools.compress(registries, self._parents))
        self._registered = _values(itertools.compress(registries, self._holding))
        self._ties = _ties(self._registered), _absent(self._registered)
        self._distinct = [i for i, first in enumerate(self._ties[0]) if i == first and self._registered[i] is not None]
        self._sizes = list(map(len, self._sized))
        self._forwards = [space.get(_FORWARD) for space in self._inner]
        self._objects = self._objects_now()
        self._forms = _forms(self._registered)
        self._guard = tensor_guard([self._registered[i] for i in self._distinct])
        self._more_forms = _forms(self._tensors)

    def _registries(self) -> list[dict[str, Any]]:
        return [*itertools.chain.from_iterable(map(_registries_of, self._spaces))]

    def _objects_now(self) -> list[Any]:
        several = itertools.chain.from_iterable([get(owner) for get, owner in self._several])
        return [*[get(owner) for get, owner in self._singles], *several]

    def holds(self) -> bool:
        """Whether the model is still in this state. Each call runs this: the loops are comprehensions and C functions."""
        try:
            registries = self._registries()
            if any(self._empty_spaces) or list(map(len, self._sized)) != self._sizes or list(map(type, self._modules)) != self._types:
                return False
            if list(map(len, registries)) != self._registry_sizes:
                return False
            if [*itertools.chain.from_iterable(itertools.compress(registries, self._filled))] != self._names:
                return False
            if not all(map(operator.is_, _values(itertools.compress(registries, self._parents)), self._children)):
                return False
            tensors = _values(itertools.compress(registries, self._holding))
            if not all(map(operator.is_, tensors, self._registered)) and (_ties(tensors), _absent(tensors)) != self._ties:
                return False
            if (self._guard is None or not self._guard(*[tensors[i] for i in self._distinct])) and _forms(tensors) != self._forms:
                return False
            if self._tensors and _forms(self._tensors) != self._more_forms:
                return False
            if not all(map(operator.is_, [space.get(_FORWARD) for space in self._inner], self._forwards)):
                return False
            if not self._same_objects(self._objects_now()):
                return False
            if not all([names.isdisjoint(absent) for names, absent in self._free]):  # noqa: C419  # a generator takes longer
                return False
            return all(get(owner) == then for get, owner, then in self._arrays)
        except (LookupError, AttributeError, RuntimeError):  # something was deleted; or another thread is changing a container
            return False

    def _same_objects(self, objects: list[Any]) -> bool:
        """Whether these are the objects noted, or plain values equal to them. Such values are noted, to be the same next time."""
        if len(objects) != len(self._objects):
            return False
        if all(map(operator.is_, objects, self._objects)):
            return True
        for i, (now, then) in enumerate(zip(objects, self._objects, strict=True)):
            if now is not then:
                if not (_is_plain(now) and _is_plain(then) and _plain(now) == _plain(then)):
                    return False
                self._objects[i] = now
        return True

    # The description

    def _say(self, name: str, what: Any) -> None:
        self.description.append((name, what))

    def _add_module(self, path: str, module: nn.Module, is_root: bool = False) -> None:
        space, label = vars(module), path or "the model"
        if id(module) in self._described:
            return
        self._described[id(module)] = module
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
        self._add_attributes(module, space, OWN_ATTRIBUTES | {_FORWARD, COMPILED_CALL}, {_CHECKPOINTS} & space.keys())

    def _add_attributes(self, owner: Any, space: dict[str, Any], left_out: frozenset[str], always: set[str]) -> None:
        """Add those attributes of a module or an object that the trace read."""
        read = self._reads.of(owner)
        names = (read | always) - left_out - {WHOLE}
        if WHOLE in read or _reads_by_itself(type(owner)):
            self._several.append((functools.partial(_attribute_names, left_out), space))
            shown = _attribute_names(left_out, space)
            self._say(f"attributes of {type(owner).__name__}", tuple(shown))
            names |= {*shown}
        # What the forward both reads and writes cannot change the graph, or the trace would have refused it. Only what it makes once, such
        # as a table, may be replaced by something else.
        counted = {name for name in self._reads.written(owner) & names if _is_plain(space.get(name))}
        names = frozenset(name for name in names - counted if not name.startswith(PREFIX)) - _OF_OBJECTS
        self._add_items(space, sorted(names & space.keys()))
        slots = {name: slot for name in names - space.keys() if (slot := _slot(type(owner), name)) is not None}
        for name, slot in sorted(slots.items()):
            self._single(functools.partial(_of_slot, slot), owner, f"values of {name!r}")
        if absent := names - space.keys() - slots.keys():
            self._free.append((space.keys(), absent))
            self._say(f"values of {min(absent)!r}", tuple(sorted(absent)))

    def _add_items(self, space: Any, names: Iterable[Any]) -> None:
        """Add items of a dict."""
        names = list(names)
        if len(names) == 1:
            self._singles.append((operator.itemgetter(names[0]), space))
        elif names:
            self._several.append((operator.itemgetter(*names), space))
        for name in names:
            self._add(f"values of {name!r}", space[name])

    def _single(self, get: _Getter, owner: Any, label: str) -> None:
        self._singles.append((get, owner))
        self._add(label, get(owner))

    def _add_function(self, function: types.FunctionType) -> None:
        """Add a function's code, its defaults and the variables of the functions around it."""
        parts = "__code__", "__defaults__", "__kwdefaults__"
        self._several.append((operator.attrgetter(*parts), function))
        for part in parts:
            self._add(f"{part} of {function.__qualname__}", getattr(function, part))
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            if id(cell) not in self._described:
                self._described[id(cell)] = cell
                self._single(_content, cell, f"values of {name!r}")

        if vars(function):
            self._add(f"attributes of {function.__qualname__}", vars(function))
        else:
            self._empty_spaces.append(vars(function))

    def _add_class(self, kind: type) -> None:
        """Add a class and its bases: the members whose names code mentions or reads, and special methods."""
        for base in kind.__mro__:
            if base in (nn.Module, object) or base.__module__ in ("typing", "abc", "builtins") or base in self._classes:
                continue
            self._classes[base] = None
            members = vars(base)
            names = [
                name for name, value in list(members.items()) if name in self._mentioned or (_is_special(name) and not _is_data(value))
            ]
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
            self._say(name, (self._numbers[id(value)] if registered else id(value), _form(value)))
            if not registered and id(value) not in self._live:
                self._arrays.append((_version, value, _version(value)))
                self._say(name, _content_of(value))
        elif issubclass(kind, _ARRAYS) or _is_array(kind):
            self._described[id(value)] = value
            self._arrays.append((_array, value, _array(value)))
            self._say(name, _array(value))
        elif issubclass(kind, types.MethodType):
            self._described[id(value)] = value
            self._say(name, (kind, id(value.__func__)))
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
            del self._described[id(value)]
            new = [(path, inner) for path, inner in value.named_modules() if id(inner) not in self._described]
            self._modules += [inner for _, inner in new]
            for path, inner in new:
                self._add_module(f"{name} {path}".rstrip(), inner)
            return
        if issubclass(kind, type):
            if not is_foreign_class(value):
                self._add_class(value)
            return
        if kind is types.FunctionType:
            if not is_foreign_name(value.__module__) and not _is_installed(value.__code__.co_filename):
                self._add_function(value)
            return
        if kind is types.MappingProxyType:
            for each in inside(value):
                self._add(name, each)
        if kind is weakref.ref:
            self._single(kind.__call__, value, name)
        if issubclass(kind, functools.partial):
            for part in (value.func, value.args):
                self._add(name, part)
            self._several.append((operator.attrgetter("func", "args", "keywords"), value))
            self._add(name, value.keywords)
        elif issubclass(kind, types.SimpleNamespace):
            self._add_contents(name, object.__getattribute__(value, "__dict__"))
        elif issubclass(kind, _CONTAINERS):
            self._add_contents(name, value)
        if not self._reads.knows(value):
            return
        if kind not in _CONTAINERS and not is_foreign_class(kind):
            self._add_class(kind)
        space = _space(value)
        if self._reads.records(kind):
            self._add_attributes(value, {} if space is None else space, frozenset(), set())
        elif space:
            self._add_contents(name, space)

    def _add_contents(self, name: str, value: Any) -> None:
        """Add the items of a container."""
        kind, items = type(value), inside(value)
        self._sized.append(value)
        self._say(name, len(items))
        if issubclass(kind, dict):
            base: Any = OrderedDict if issubclass(kind, OrderedDict) else dict
            self._several += [(base.keys, value), (base.values, value)]
        elif items:
            base = next(each for each in _CONTAINERS if issubclass(kind, each))
            self._several.append((base.__iter__, value))
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


def _values(registries: Iterable[dict[str, Any]]) -> list[Any]:
    return [*itertools.chain.from_iterable([registry.values() for registry in registries])]


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
    return shapes, dtypes, devices, [tensor.is_meta for tensor in present], _absent(tensors)


def _form(tensor: Any) -> Any:
    """Return the shape, dtype and device of a tensor; None for None."""
    return None if tensor is None else (None if nn.parameter.is_lazy(tensor) else tuple(tensor.shape), tensor.dtype, str(tensor.device))


def _ties(tensors: list[Any]) -> list[int]:
    """Return, for each tensor, the position at which it comes first."""
    first: dict[int, int] = {}
    return [first.setdefault(id(tensor), i) for i, tensor in enumerate(tensors)]


def _absent(tensors: list[Any]) -> list[bool]:
    return [tensor is None for tensor in tensors]


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


def _is_data(value: Any) -> bool:
    """Whether the value of a member of a class is data, and not a function or a descriptor."""
    return _is_plain(value) or issubclass(type(value), _CONTAINERS)


def _is_special(name: str) -> bool:
    return name.startswith("__") and name.endswith("__")


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


def _space(value: Any) -> dict[str, Any] | None:
    """Return an object's ``__dict__``; None if it has none."""
    try:
        space = object.__getattribute__(value, "__dict__")
    except (AttributeError, TypeError):
        return None
    return space if type(space) is dict else None


def _reads_by_itself(kind: type) -> bool:
    """Whether a class has a ``__getattribute__`` of its own, which may read other attributes than it is asked for."""
    own = next((base for base in kind.__mro__ if "__getattribute__" in vars(base)), object)
    return own is not object and not is_foreign_class(own)


def _slot(kind: type, name: str) -> Any:
    found = next((vars(base)[name] for base in kind.__mro__ if name in vars(base)), None)
    return found if type(found) is types.MemberDescriptorType else None


def _of_slot(slot: Any, owner: Any) -> Any:
    try:
        return slot.__get__(owner)
    except AttributeError:
        return _ABSENT


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return _ABSENT


def _is_installed(file: str) -> bool:
    """Whether a file of Python code belongs to an installed package. There are hundreds of variables, which users do not change."""
    folders = file.replace("\\", "/")
    return "/site-packages/" in folders or "/dist-packages/" in folders
