"""``Fingerprint`` records everything that a graph depends on besides its inputs.

Before a graph runs, its fingerprint is compared with the model, so that no call runs a graph from before a change of the model.
"""

from __future__ import annotations

import itertools
import operator
import sys
import types
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from graphreg.blocks import unwrapped_block
from graphreg.ir import PREFIX
from graphreg.torch_internals import Changes
from graphreg.tracing import ReachableCode, is_foreign_class, is_foreign_name, reachable_code

# The attributes that every module has, and a ``forward`` that was replaced on the object. ``Fingerprint`` compares submodules, shapes of
# parameters and such a ``forward`` in another way, ``StructureGraph.refuse_hooks`` checks hooks, and the graph itself reads the modes or
# asserts that they are as at the trace.
_FORWARD = "forward"
_OWN = frozenset(vars(nn.Module())) | {_FORWARD}
_NUMBERS = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
_CONTAINERS = (list, tuple, dict, OrderedDict, defaultdict, deque)  # no subclass of these: a subclass may run any code to read an item
_LARGEST = 1000  # the number of items up to which the items of a container are compared; a larger container is compared by identity
_CHECKPOINTS = "gradient_checkpointing"
_MISSING = object()
_DEPTH = 4  # the number of levels of nested objects and containers whose contents are compared
_Names = frozenset[str]
Reads = dict[int, set[str]]  # for the id of each module or other object: the names of its attributes that code read during a trace
_Getter = Callable[[Any], Any]


class Fingerprint:
    """What a graph was traced from: the modules by identity, the shapes of parameters, and the values that the forwards may read.

    These values are attributes of modules, attributes of objects such as a configuration, global variables, and variables of enclosing
    functions. To make a fingerprint takes milliseconds. A call of ``same`` takes microseconds for each module.
    """

    def __init__(self, model: nn.Module, reads: Reads | None = None) -> None:
        """``reads``: the attributes that the trace read; None for all attributes whose names the code of the forwards mentions."""
        self._reads = reads
        self._modules_now: list[dict[str, Any]] = []
        self._parameters: list[dict[str, Any]] = []
        self._paths: list[str] = []
        self._plain: list[tuple[_Getter, Any]] = []  # for values compared by ==: a getter, and its argument
        self._values: list[Any] = []  # the results of the getters in ``_plain`` at the trace
        self._others: list[tuple[_Getter, Any]] = []  # for values compared by identity: a getter, and its argument
        self._objects: list[Any] = []  # the results of the getters in ``_others`` at the trace
        self._variables: set[tuple[int, str]] = set()  # the global variables added so far: the id of the namespace, and the name
        # for each module or object, its attributes that are in its class, but not in its ``__dict__``: the names; the values in the class;
        # the ``__dict__``, in which an attribute of this name may appear later
        self._absent: list[tuple[Any, dict[str, Any], dict[str, Any]]] = []
        self._named: list[tuple[_Getter, Any, str, Any, bool]] = []  # (getter, argument, name, value, whether by ==)
        kinds = {type(module): module for module in model.modules() if not is_foreign_class(type(module))}
        codes = {kind: reachable_code([module]) for kind, module in kinds.items()}
        mentioned = {kind: _mentioned(code) for kind, code in codes.items()}
        everywhere = frozenset().union(*mentioned.values())
        for path, module in model.named_modules():
            if module._modules:
                self._modules_now.append(module._modules)
                self._paths.append(path)
            if module._parameters:
                self._parameters.append(module._parameters)
        seen: set[int] = set()
        for module in model.modules():
            if type(module) in mentioned:
                self._add(module, self._read_in(module, mentioned[type(module)]), everywhere, seen)
        for code in codes.values():
            self._add_variables(code, everywhere, seen)
        self._inner = {path: vars(module) for path, module in model.named_modules() if path}
        self._forwards = [space.get(_FORWARD) for space in self._inner.values()]
        self._modules_then = [dict(modules) for modules in self._modules_now]
        self._shapes = _shapes(self._parameters)

    def _add(self, owner: Any, names: _Names, everywhere: _Names, seen: set[int], depth: int = _DEPTH) -> None:
        """Add the attributes of a module or object, and the contents of these attributes.

        Args:
            owner: The module or object.
            names: The names of the owner's attributes that code may read.
            everywhere: The names that any code of the model mentions. If no reads are known, code may read these attributes of any object.
            seen: The ids of the objects, containers and closure cells that were added so far.
            depth: The number of levels of objects and containers to enter.
        """
        if id(owner) in seen:
            return
        seen.add(id(owner))
        space = vars(owner)
        counted = {n: n for n in space if n not in _OWN and not n.startswith(PREFIX) and n in names}
        self._add_items(space, counted, everywhere, seen, depth)
        absent = {n: _of_class(owner, n) for n in names if n not in space and n not in _OWN}
        if absent := {name: value for name, value in absent.items() if isinstance(value, _NUMBERS)}:
            self._absent.append((absent.keys(), absent, space))

    def _add_items(self, space: Any, titles: Mapping[Any, str], everywhere: _Names, seen: set[int], depth: int) -> None:
        """Add items of a dict or a sequence, and their contents. ``titles``: the keys of the items, each with its name for messages."""
        plain = [key for key in titles if _is_plain(space[key])]
        if plain:
            self._plain.append((operator.itemgetter(*plain), space))
            values = [_copied(space[key]) for key in plain]
            self._values.append(tuple(values) if len(plain) > 1 else values[0])
            self._named += [(operator.itemgetter(k), space, titles[k], v, True) for k, v in zip(plain, values, strict=True)]
        for key in titles.keys() - set(plain):
            self._add_other(operator.itemgetter(key), space, titles[key], everywhere, seen, depth)

    def _add_other(self, get: _Getter, space: Any, title: str, everywhere: _Names, seen: set[int], depth: int) -> None:
        """Add a value that is compared by identity. If the value is an object or a container, add its contents, too."""
        value = get(space)
        self._others.append((get, space))
        self._objects.append(value)
        self._named.append((get, space, title, value, False))
        if not depth:
            return
        if _is_object(value):
            self._add(value, self._read_of(value, everywhere), everywhere, seen, depth - 1)
        elif type(value) in _CONTAINERS and len(value) <= _LARGEST and id(value) not in seen:
            seen.add(id(value))
            self._plain.append((len, value))
            self._values.append(len(value))
            self._named.append((len, value, title, len(value), True))
            keys = value if isinstance(value, dict) else range(len(value))
            self._add_items(value, dict.fromkeys(keys, title), everywhere, seen, depth - 1)

    def _add_variables(self, code: ReachableCode, everywhere: _Names, seen: set[int]) -> None:
        """Add the global variables that code mentions, and the variables of enclosing functions, if their values are data.

        The variables of installed packages are left out: there are hundreds, such as tables of classes, and users do not change these
        between training steps.
        """
        for space, names in code.variables.values():
            if _is_installed(str(space.get("__file__", ""))):
                continue
            new = [name for name in names if _is_data(space[name]) and (id(space), name) not in self._variables]
            self._variables.update((id(space), name) for name in new)
            self._add_items(space, {name: name for name in new}, everywhere, seen, _DEPTH)
        for function in code.functions.values():
            if _is_installed(function.__code__.co_filename):
                continue
            for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
                if id(cell) in seen or not _is_data(_content(cell)):
                    continue
                seen.add(id(cell))
                if _is_plain(value := _content(cell)):
                    self._plain.append((_content, cell))
                    self._values.append(_copied(value))
                    self._named.append((_content, cell, name, self._values[-1], True))
                else:
                    self._add_other(_content, cell, name, everywhere, seen, _DEPTH)

    def _read_in(self, module: nn.Module, names: _Names) -> _Names:
        """Return those of ``names`` that the trace read as attributes of a module; all of ``names`` if the reads are not known.

        ``names`` are the names that the code of the module mentions. A read of the whole ``__dict__`` counts as a read of every name, and
        ``gradient_checkpointing`` always counts as read.
        """
        read = None if self._reads is None else self._reads.get(id(module))
        return names if read is None or "__dict__" in read else names & (read | {_CHECKPOINTS})

    def _read_of(self, value: Any, everywhere: _Names) -> _Names:
        """Return the names of an object's attributes that the trace read; if the reads are not known, return ``everywhere``.

        The result also contains the names to which a dict of the object's class maps these names (see ``_mapped``).
        """
        read = None if self._reads is None else self._reads.get(id(value), set())
        names = everywhere if read is None or "__dict__" in read else frozenset(read)
        return names | _mapped(type(value), names)

    def same(self) -> bool:
        """Whether the model is as it was at the trace. The loops are comprehensions and C functions, for speed: each call runs them."""
        modules = self._modules_now, self._modules_then
        if not all(map(operator.eq, *modules)) and not all(map(_same_modules, *modules)):  # == of two modules compares identities
            return False
        if _shapes(self._parameters) != self._shapes or [space.get(_FORWARD) for space in self._inner.values()] != self._forwards:
            return False
        try:
            if [get(space) for get, space in self._plain] != self._values:
                return False
            if not all(map(operator.is_, [get(space) for get, space in self._others], self._objects)):
                return False
        except LookupError:  # an attribute was deleted
            return False
        return all(names.isdisjoint(space) or not _shadowed(values, space) for names, values, space in self._absent)

    def changed(self) -> str:
        """Describe the first change of the model that is found, for a log message; ``""`` if the model has not changed."""
        for now, then, path in zip(self._modules_now, self._modules_then, self._paths, strict=True):
            if not _same_modules(now, then):
                return f"submodules of {path or 'the model'}"
        if _shapes(self._parameters) != self._shapes:
            return "shapes of parameters"
        for (path, space), forward in zip(self._inner.items(), self._forwards, strict=True):
            if space.get(_FORWARD) != forward:
                return f"the forward of {path}"
        for get, space, title, value, plain in self._named:
            try:
                present = get(space)
            except LookupError:
                present = _MISSING
            if (present != value) if plain and present is not _MISSING else (present is not value):
                return f"values of {title!r}"
        return next((f"values of {name!r}" for _, values, space in self._absent for name in _shadowed(values, space)), "")


@contextmanager
def reads_recorded(model: nn.Module) -> Iterator[Reads]:
    """Within the context, record which attributes code reads: those of modules, and of objects in their attributes or in global variables.

    Such an object is, for example, a configuration. The context manager yields the records, which grow while the context lasts.
    """
    objects: dict[int, Any] = {id(m): m for m in model.modules() if not is_foreign_class(type(m))}
    spaces = [vars(m) for m in model.modules() if not is_foreign_class(type(m))]
    spaces += [space for space, _ in reachable_code(model.modules()).variables.values()]
    waiting = [(value, _DEPTH) for space in spaces for value in space.values()]
    seen: dict[int, Any] = {}
    while waiting:
        value, depth = waiting.pop()
        is_object = _is_object(value)
        if id(value) in seen or not (is_object or (type(value) in _CONTAINERS and len(value) <= _LARGEST)):
            continue
        seen[id(value)] = value
        if is_object:
            objects[id(value)] = value
        inside = vars(value).values() if is_object else value.values() if isinstance(value, dict) else value
        waiting += [(inner, depth - 1) for inner in inside if depth]
    reads: Reads = {key: set() for key in objects}
    with Changes() as changes, changes:
        for kind in {type(value) for value in objects.values()}:
            changes.put(kind, "__getattribute__", _recording(cast(Any, kind).__getattribute__, reads))
        yield reads


def _recording(original: Callable[[Any, str], Any], reads: Reads) -> Callable[[Any, str], Any]:
    def get(self: Any, name: str) -> Any:
        if id(self) in reads and (name != "__dict__" or _is_of_model(sys._getframe(1))):
            reads[id(self)].add(name)
        return original(self, name)

    return get


def _is_of_model(frame: types.FrameType) -> bool:
    """Whether a frame that reads a whole ``__dict__`` runs code of the model, and not a copy, a pickle or graphreg's search for changes."""
    return not is_foreign_name(frame.f_globals.get("__name__")) and frame.f_code.co_name not in ("__getstate__", "__reduce_ex__")


def _mentioned(code: ReachableCode) -> _Names:
    """Return the names that code mentions, and its string constants, because the code may pass these to ``getattr``."""
    texts = {text for function in code.functions.values() for text in function.__code__.co_consts if isinstance(text, str)}
    return frozenset(code.mentioned | texts | {_CHECKPOINTS})


def _mapped(kind: type, names: _Names) -> _Names:
    """Return the names to which a class's dicts map ``names``. Such a dict is ``attribute_map`` of a configuration of transformers."""
    maps = [value for base in kind.__mro__ for value in vars(base).values() if type(value) is dict]
    return frozenset(value for each in maps for key, value in each.items() if key in names and isinstance(value, str))


def _same_modules(now: dict[str, Any], then: dict[str, Any]) -> bool:
    """Whether a module has the same submodules as at the trace.

    A new wrapper of activation checkpointing around a block is no change, because the graph calls the block through the wrapper.
    """
    return now.keys() == then.keys() and all(m is then[name] or (m and unwrapped_block(m)) is then[name] for name, m in now.items())


def _shapes(registries: list[dict[str, Any]]) -> list[Any]:
    parameters = list(itertools.chain.from_iterable(registry.values() for registry in registries))
    try:
        return [None if p is None else p.shape for p in parameters]
    except RuntimeError:  # a parameter that is not initialized yet has no shape
        return [None if p is None or nn.parameter.is_lazy(p) else p.shape for p in parameters]


def _shadowed(values: dict[str, Any], space: dict[str, Any]) -> list[str]:
    """Return the names for which an object's ``__dict__`` (``space``) has another value than the object's class (``values``)."""
    return [name for name, value in values.items() if name in space and space[name] != value]


def _is_plain(value: Any) -> bool:
    kind = type(value)
    if kind in (list, tuple, set, frozenset):
        return len(value) <= _LARGEST and all(map(_is_plain, value))
    if kind is dict:
        return len(value) <= _LARGEST and all(map(_is_plain, value.values()))
    return isinstance(value, _NUMBERS)


def _copied(value: Any) -> Any:
    kind = type(value)
    if kind in (list, tuple):
        return kind(map(_copied, value))
    if kind is dict:
        return {key: _copied(item) for key, item in value.items()}
    return set(value) if kind is set else value


def _is_object(value: Any) -> bool:
    """Whether a value is an object with attributes, such as a configuration, and is neither a module, a tensor, a function nor a class."""
    if isinstance(value, (nn.Module, Tensor, type)) or callable(value) or is_foreign_class(type(value)):
        return False
    return hasattr(value, "__dict__")


def _is_data(value: Any) -> bool:
    """Whether the value of a variable is data that a forward may read, and is neither a function, a class nor a Python module."""
    return _is_plain(value) or isinstance(value, Tensor) or type(value) in _CONTAINERS or _is_object(value)


def _is_installed(file: str) -> bool:
    """Whether a file of Python code belongs to an installed package."""
    folders = file.replace("\\", "/")
    return "/site-packages/" in folders or "/dist-packages/" in folders


def _content(cell: types.CellType) -> Any:
    """Return the value of a variable of an enclosing function.

    If the variable is not assigned yet, return the function ``_content`` itself. No function is data, so the variable is left out.
    """
    try:
        return cell.cell_contents
    except ValueError:
        return _content


def _of_class(owner: Any, name: str) -> Any:
    return next((vars(kind)[name] for kind in type(owner).__mro__ if name in vars(kind)), _MISSING)
