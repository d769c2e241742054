"""``Reads`` records which attributes code reads and writes during a trace: those of modules, and of objects that it reaches from there."""

from __future__ import annotations

import enum
import sys
import threading
import types
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

from torch import Tensor, fx, nn

from graphreg.ir.contents import compares_identity, parts
from graphreg.torch_internals.dynamo_marks import skip_frame
from graphreg.torch_internals.modules import OWN_ATTRIBUTES, forward_hooks
from graphreg.torch_internals.patching import Changes
from graphreg.tracing.frames import home_of
from graphreg.tracing.side_effects.imports import follow_imports
from graphreg.tracing.side_effects.reachable_state import (
    ReachableCode,
    held,
    inside,
    is_foreign_class,
    is_own,
    keep_for_next,
    reachable_code,
)
from graphreg.tracing.side_effects.stand_ins import ChangingNumber
from graphreg.tracing.side_effects.state_places import content, own_attributes

WHOLE = "__dict__"  # stands for all attributes of an object
_NOT_ENTERED = (
    Tensor,
    fx.Proxy,
    types.ModuleType,
    bool,
    int,
    float,
    str,
    bytes,
    enum.Enum,
)
# the flags of a class that Python code made, and of a class whose attributes cannot be set
_CHANGEABLE = 1 << 9, 1 << 8
# The code of these packages reads much and decides nothing, or nothing but by what is compared
# anyway: registries and classes.
_TRACERS = ("graphreg.", "torch.fx", "torch.export", "torch._", "torch.utils", "torch.nn.modules.module")
_ANSWERING = ("graphreg.tracing.isinstance_patch", "graphreg.tracing.symbolic.questions")
_COPIERS = ("copy", "copyreg", "pickle")
_ALL = ("__dir__", "__reduce__", "__reduce_ex__", "__getstate__")  # who reads one of these gets all attributes, as a copy does


class _Recording(threading.local):
    paused = False  # whether the code that runs is that of a proof, and not of a trace


_thread = _Recording()


@contextmanager
def not_recorded() -> Iterator[None]:
    """Within the context, record nothing. Calls of the model itself read much that its graph does not depend on."""
    before, _thread.paused = _thread.paused, True
    try:
        yield
    finally:
        _thread.paused = before


class Reads:
    """The names of the attributes that code read and wrote while ``recorded`` lasted.

    Attributes:
        code: The code that could run meanwhile.
        roots: What the code got as arguments and the structure of the call does not describe.
    """

    def __init__(self) -> None:
        self.code, self.roots = ReachableCode(), list[Any]()
        # by the id of the owner; a name that was absent counts as read, too
        self._read: dict[int, set[str]] = {}
        self._written: dict[int, set[str]] = {}
        self._counts: dict[int, set[str]] = {}
        self._hooks: set[types.CodeType] = set()
        self._refused: set[type] = set()
        # keeps the owners alive, so that no other object gets their ids
        self._owners: dict[int, Any] = {}

    def of(self, owner: Any) -> frozenset[str]:
        """Return the names that code read before it wrote them. ``WHOLE`` is among them if it read the whole ``__dict__``."""
        return frozenset(self._read.get(id(owner), ()))

    def written(self, owner: Any) -> frozenset[str]:
        """Return the names that code wrote."""
        return frozenset(self._written.get(id(owner), ()))

    def counts(self, owner: Any) -> frozenset[str]:
        """Return the names of numbers that each call changes, such as a count of calls; also those in which a hook counts.

        The trace has seen to it that the graph does not depend on them.
        """
        return frozenset(self._counts.get(id(owner), ()))

    def names(self) -> set[str]:
        """Return all names that code read."""
        return set().union(*self._read.values())

    def knows(self, owner: Any) -> bool:
        """Return whether code could reach the object through what it read."""
        return id(owner) in self._owners

    @contextmanager
    def recorded(self, model: nn.Module, arguments: Any = ()) -> Iterator[None]:
        """Within the context, record the reads and writes that the code of this thread makes. ``arguments``: those of the call."""
        kinds: set[type] = set()
        thread = threading.get_ident()
        self.roots = undescribed_roots(arguments)
        modules = [inner for root in (model, *self.roots) if isinstance(root, nn.Module) for inner in root.modules()]
        hooks = (getattr(hook, "__func__", hook) for module in modules for hook in forward_hooks(module))
        self._hooks = {hook.__code__ for hook in hooks if type(hook) is types.FunctionType}
        with Changes() as changes, changes:

            def watch(kind: type) -> None:
                if kind in kinds:
                    return
                kinds.add(kind)
                try:
                    changes.put(kind, "__getattribute__", self._reading(cast(Any, kind).__getattribute__, watch, thread))
                    changes.put(kind, "__setattr__", self._writing(cast(Any, kind).__setattr__, thread))
                except (AttributeError, TypeError):
                    # its metaclass does not let anybody set attributes
                    self._refused.add(kind)
                    if issubclass(kind, nn.Module):
                        watch(nn.Module)

            def search() -> None:
                self.code = reachable_code(modules, values=self.roots)
                self._reach([*map(type, modules), *self.code.classes, *self.code.functions.values()], watch)
                for space, names in self.code.variables.values():
                    self._reach([space[name] for name in names if name in space], watch)

            self._reach([*modules, *self.roots], watch)
            search()
            follow_imports(changes, search)
            if not self.roots:
                keep_for_next(modules, self.code)
                changes.later(partial(keep_for_next, [], None))
            yield

    def _reading(self, original: Callable[[Any, str], Any], watch: Callable[[type], None], thread: int) -> Callable[[Any, str], Any]:
        def get(owner: Any, name: str) -> Any:
            if name in OWN_ATTRIBUTES or (names := self._read.get(id(owner))) is None or name in names or threading.get_ident() != thread:
                return original(owner, name)
            if name in self._written[id(owner)] or not _decides(name, sys._getframe(1)):
                return original(owner, name)
            names.add(WHOLE if name in _ALL else name)
            value = original(owner, name)
            self._reach(held(owner).values() if name in _ALL else [value], watch)
            return value

        skip_frame(get)
        return get

    def _writing(self, original: Callable[[Any, str, Any], None], thread: int) -> Callable[[Any, str, Any], None]:
        def put(owner: Any, name: str, value: Any) -> None:
            names = self._written.get(id(owner))
            if names is not None and name not in OWN_ATTRIBUTES and threading.get_ident() == thread and _decides(name, sys._getframe(1)):
                names.add(name)
                if type(value) is ChangingNumber or (sys._getframe(1).f_code in self._hooks and _counted(owner, name, value)):
                    self._counts.setdefault(id(owner), set()).add(name)
            original(owner, name, value)

        skip_frame(put)
        return put

    def _reach(self, values: Iterable[Any], watch: Callable[[type], None]) -> None:
        """Record from now on what code reads of these objects, and of those in their containers."""
        waiting = list(values)
        while waiting:
            value = waiting.pop()
            kind = type(value)
            if value is None or id(value) in self._owners or issubclass(kind, _NOT_ENTERED):
                continue
            self._owners[id(value)] = value
            waiting += inside(value)
            if issubclass(kind, (type, types.FunctionType)):
                waiting += _held(value)
                continue
            self._read[id(value)], self._written[id(value)] = set(), set()
            waiting += _descriptors(kind)
            if reads_by_itself(kind):
                waiting += held(value).values()
            if issubclass(kind, nn.Module):
                # not nn.Module itself: Python visits all subclasses of a class that gets such a method, and there may be thousands
                for base in kind.__mro__[: kind.__mro__.index(nn.Module)]:
                    if base is kind or "__getattribute__" in vars(base) or "__setattr__" in vars(base):
                        watch(base)
            elif self.records(kind):
                watch(kind)

    def records(self, kind: type) -> bool:
        """Return whether reads of the attributes of such an object can be recorded. If not, all its attributes count as read."""
        made, fixed = _CHANGEABLE
        return bool(kind.__flags__ & made) and not kind.__flags__ & fixed and kind not in self._refused


def undescribed_roots(arguments: Any) -> list[Any]:
    """Return what arguments lead to and the structure of the call does not describe: what it compares by identity, and users' classes."""
    roots: dict[int, Any] = {}
    for value, _, is_data in parts(arguments):
        kind = type(value)
        if compares_identity(value, is_data) and (kind is not types.FunctionType or is_own(value)):
            roots[id(value)] = value
        if is_own(kind):
            roots[id(kind)] = kind
    return list(roots.values())


def _counted(owner: Any, name: str, value: Any) -> bool:
    """Return whether a number takes the place of a number or of nothing. What a hook sets once, it finds as None or as an object."""
    return type(value) in (int, float) and type((own_attributes(owner) or {}).get(name, 0)) in (int, float)


def reads_by_itself(kind: type) -> bool:
    """Return whether a class has a ``__getattr__`` or ``__getattribute__`` of its own, which may read others than it is asked for.

    The ``__getattr__`` of a module does not count: wrappers of adapters have one, and what it reads of modules is recorded.
    """
    for name in ("__getattribute__",) if issubclass(kind, nn.Module) else ("__getattribute__", "__getattr__"):
        own = next((base for base in kind.__mro__ if name in vars(base)), object)
        if own is not object and not is_foreign_class(own):
            return True
    return False


def _descriptors(kind: type) -> list[Any]:
    """Return the descriptors of the user's in a class: what an attribute is may depend on what they hold."""
    members = [member for base in kind.__mro__ if is_own(base) for member in vars(base).values()]
    return [member for member in members if hasattr(type(member), "__get__") and not is_foreign_class(type(member))]


def _held(value: Any) -> list[Any]:
    """Return what code can read of a function (its defaults, attributes and variables of functions around) or of a class (its members)."""
    if not issubclass(type(value), types.FunctionType):
        return [member for base in value.__mro__ if is_own(base) for member in vars(base).values()]
    if not is_own(value):
        return []
    around = [content(cell) for cell in value.__closure__ or ()]
    return [*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values(), *vars(value).values(), *around]


def _decides(name: str, frame: types.FrameType) -> bool:
    """Return whether an access counts: one by the code that is traced, or by a copy or pickle that it makes, and not by a tracer.

    The whole ``__dict__`` is read by much of Python's and torch's own code, and then decides
    nothing.
    """
    if _thread.paused:
        return False
    reader = home_of(frame)
    # ``hasattr`` and the like, which a trace replaces, and copies
    while (reader.startswith(_ANSWERING) or reader in _COPIERS) and frame.f_back is not None:
        frame = frame.f_back
        reader = home_of(frame)
    if name == WHOLE and frame.f_code.co_name == "__dir__":  # dir(module)
        return True
    if name == WHOLE and (reader.startswith("torch.") or frame.f_code.co_name in ("__getstate__", "__reduce_ex__")):
        return False
    return not reader.startswith(_TRACERS)
