"""Places that a forward may change, with their earlier content: attributes, variables, containers, memory."""

from __future__ import annotations

import gc
import queue
import threading
import types
from collections import ChainMap, OrderedDict, UserDict, UserList, deque
from collections.abc import Callable, Iterator, Mapping
from operator import is_
from typing import Any

import torch
from torch import fx, nn
from torch.fx.proxy import Attribute
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from graphreg.errors import TraceError
from graphreg.ir.operations import SIZE_ATTRIBUTES, function_name
from graphreg.torch_internals.autograd import gradient_hooks, is_plain_data, set_gradient_hooks, storage_number, version_of
from graphreg.torch_internals.fake_tensors import is_fake
from graphreg.torch_internals.functorch import is_wrapped
from graphreg.torch_internals.modules import REGISTERED
from graphreg.torch_internals.torch_modes import without_modes
from graphreg.tracing.side_effects.stand_ins import ChangingNumber, StaleValue, changing

PLAIN = (int, float, complex, str, bytes, type(None))
# classes of Python's library and of torch whose attributes are state
OBJECTS = (types.SimpleNamespace, threading.local, queue.Queue, UserDict, UserList, ChainMap, Optimizer, LRScheduler)
_NO_HOOKS: list[dict[int, Any]] = [{}, {}]
NOTHING = object()  # stands for a value that does not exist


# how many items to add to a container that grows: no earlier call left so many
_FAR = 10_000
# what gives an object's attributes
_DICTS = (types.GetSetDescriptorType, types.MemberDescriptorType)


class StatePlace:
    """Something that a forward may change (attributes, variables, a container, a generator), with the content from before the forward.

    Attributes:
        owner: The object that has the content.
        name: The name of the place, for errors.
        content: The content before the forward ran.
    """

    def __init__(self, owner: Any, name: str) -> None:
        """Note the present content."""
        self.owner, self.name = owner, name
        self.content = self.read()

    def read(self) -> Any:
        """Return the present content, in a form that can be compared with ``content``."""
        raise NotImplementedError

    def prepare_retrace(self) -> Iterator[str]:
        """Prepare the place for another trace.

        Numbers and strings stay as the forward left them. A ``StaleValue`` or the earlier content
        replaces each proxy.

        Yields:
            The names of the attributes, variables and containers that stay changed.

        Raises:
            TraceError: The forward made a change that no graph can make.
        """
        self.note()
        yield from self.left()

    def restore(self) -> None:
        """Restore the content from before the forward."""
        raise NotImplementedError

    def same(self) -> bool:
        """Return whether the content is that from before the forward. False where only ``restore`` finds out."""
        return bool(self.read() == self.content)

    def left(self) -> list[str]:
        """Return the names of what has changed. Unlike ``prepare_retrace``, this changes nothing."""
        return [] if self.same() else [self.name]

    def note(self) -> None:
        """Note what ``mark_counters`` needs, after a forward that ran on real tensors: these may stay."""

    def hide(self) -> bool:
        """Put stand-ins in place of what has changed. Return False if something that has changed cannot be hidden."""
        return not self.left()

    def mark_counters(self) -> bool:
        """Put a stand-in for what each call changes in place of what has changed again since ``prepare_retrace``; return whether any has.

        Code that asks the stand-in for what changes, such as the length of a list that grows, raises TypeError.
        """
        return False


def is_same(now: Mapping[Any, Any], then: Mapping[Any, Any]) -> bool:
    """Return whether two dicts have the same objects as keys and as values, in the same order. No ``__eq__`` of the user's is called."""
    # a module of torch.jit has a mapping of its own, which cannot be iterated
    if not issubclass(type(now), (dict, types.MappingProxyType)):
        now = dict(now.items())
    return len(now) == len(then) and all(map(is_, now.values(), then.values())) and all(map(is_, now, then))


class Attributes(StatePlace):
    """The attributes of a module, class, object or function."""

    # after ``prepare_retrace``: the numbers and strings that stay as the forward left them
    retained: Mapping[str, Any] = {}
    # after ``prepare_retrace``: the tensors that the forward made and assigned
    tensors: Mapping[str, torch.Tensor] = {}

    def now(self) -> Mapping[Any, Any]:
        """Return the present content, not copied where that saves time."""
        return own_attributes(self.owner) or {}

    def read(self) -> dict[str, Any]:
        return dict(self.now().items())

    def set(self, key: str, value: Any) -> None:
        """Set one attribute."""
        if issubclass(type(self.owner), type):
            setattr(self.owner, key, value)
        else:
            vars(self.owner)[key] = value

    def delete(self, key: str) -> None:
        """Delete one attribute."""
        if issubclass(type(self.owner), type):
            delattr(self.owner, key)
        else:
            del vars(self.owner)[key]

    def label(self, key: str) -> str:
        """Return the name of one attribute, for errors."""
        return f"{self.name}.{key}"

    def same(self) -> bool:
        return is_same(self.now(), self.content)

    def changed(self) -> list[str]:
        """Return the names of the attributes that were added, deleted or set to another object."""
        if is_same(now := self.now(), self.content):
            return []
        apart = REGISTERED if issubclass(type(self.owner), nn.Module) else ()
        keys = [key for key in {**self.content, **now} if key not in apart]
        return [key for key in keys if now.get(key, NOTHING) is not self.content.get(key, NOTHING)]

    def prepare_retrace(self) -> Iterator[str]:
        changed = self.changed()
        if not changed and not self.retained and not self.tensors:
            return
        self.retained, self.tensors = dict[str, Any](), dict[str, torch.Tensor]()
        now = self.read()
        for key in changed:
            value = now.get(key, NOTHING)
            is_tensor, was_tensor = issubclass(type(value), torch.Tensor), issubclass(type(self.content.get(key)), torch.Tensor)

            # Real zeros replace a fake tensor of fixed size: the model's code can read the numbers
            # of real tensors only.
            if is_tensor and not was_tensor and is_fake(value) and all(type(size) is int for size in value.shape):
                self.set(key, value := torch.zeros(tuple(value.shape), dtype=value.dtype, device=value.device))
            if type(value) is torch.Tensor and not issubclass(type(self.owner), type):
                # the forward made this tensor; ``reassigned`` finds out if it is a fixed table or a
                # running sum
                self.tensors[key] = value
                continue
            if is_plain(value):
                self.retained[key] = value
            elif not issubclass(type(self.owner), type) and (_is_state(value) or (is_tensor and was_tensor)):
                self.set(key, StaleValue())
            else:
                self._restore_key(key)
                continue
            yield self.label(key)

    def reassigned(self) -> Iterator[str]:
        """Yield the names of attributes to which another trace has assigned tensors with other content."""
        now = self.read()
        for key, then in self.tensors.items():
            value = now.get(key)
            same = type(value) is torch.Tensor and value.shape == then.shape and value.dtype == then.dtype and torch.equal(value, then)
            if value is not then and not same:
                yield self.label(key)

    def restore(self) -> None:
        for key in self.changed():
            self._restore_key(key)

    def left(self) -> list[str]:
        return list(map(self.label, self.changed()))

    def note(self) -> None:
        now = self.read()
        self.retained = {key: now[key] for key in self.changed() if is_plain(now.get(key, NOTHING))}

    def hide(self) -> bool:
        now = self.read()
        for key in (changed := self.changed()):
            if key in now:
                # another number, since an operation of torch takes it as it is
                self.set(key, ChangingNumber(now[key] + 1) if type(now[key]) in (int, float) else StaleValue())
        return now.keys() >= {*changed}

    def _restore_key(self, key: str) -> None:
        """Restore one attribute."""
        if key in self.content:
            self.set(key, self.content[key])
        else:
            self.delete(key)

    def mark_counters(self) -> bool:
        marked, attributes = False, self.read()
        for key, then in self.retained.items():
            now: Any = attributes.get(key)
            if type(now) in (int, float) and now != then:
                self.set(key, ChangingNumber(now))
                marked = True
        return marked


class ParameterState(Attributes):
    """A parameter: its attributes, its gradient and the hooks of it, ``requires_grad``, and which data it has, but not their elements.

    Attributes:
        data: A tensor with the parameter's data, which takes no memory; the parameter itself if its class has data of another kind.
        gradient: The gradient, or None.
    """

    def __init__(self, owner: torch.Tensor, name: str, may_accumulate: bool) -> None:
        """Note the present state. ``may_accumulate``: whether the forward may run a backward pass, which writes into the gradient."""
        self.owner, self.name, self.content = owner, name, dict(own_attributes(owner))
        plain = is_plain_data(owner) and owner.layout is torch.strided and not is_wrapped(owner)
        self.data = owner.data if plain else owner
        self._place = _place_of(self.data) if plain else None
        self._leaf, self._requires_grad = owner.is_leaf, owner.requires_grad
        self.gradient = owner.grad if self._leaf else None
        self._hooks = gradient_hooks(owner)
        self._held = [dict(hooks or ()) for hooks in self._hooks] if any(self._hooks) else _NO_HOOKS
        if self.gradient is not None:
            self._written = version_of(self.gradient)
            self._elements = self.gradient.clone() if may_accumulate else None

    def facts(self) -> dict[str, Any]:
        """Return what has changed, but for attributes, by its name: the data that are there now, a copy of the gradient, and so on."""
        name, owner, changed = self.name.removeprefix("self."), self.owner, dict[str, Any]()
        if self._place is not None and _place_of(owner) != self._place:
            changed[f"the parameter {name}"] = owner.detach().clone()
        gradient = owner.grad if owner.is_leaf else None
        if gradient is not self.gradient or (gradient is not None and version_of(gradient) != self._written):
            changed[f"the gradient of {name}"] = None if gradient is None else gradient.detach().clone()
        if owner.requires_grad != self._requires_grad:
            changed[f"requires_grad of {name}"] = owner.requires_grad
        hooks = sum(len(hooks or ()) for hooks in gradient_hooks(owner))
        if hooks != sum(map(len, self._held)):
            changed[f"the number of gradient hooks of {name}"] = hooks
        return changed

    def same(self) -> bool:
        return False

    def restore(self) -> None:
        super().restore()
        owner = self.owner
        if self._leaf and not owner.is_leaf:  # autograd has recorded a write into it
            owner.detach_()
        if self._place is not None and _place_of(owner) != self._place:
            owner.data = self.data
        if owner.requires_grad != self._requires_grad:
            owner.requires_grad_(self._requires_grad)
        if self._leaf and owner.grad is not self.gradient:
            owner.grad = self.gradient
        # an operation that a tracer runs below autograd counts no version
        if self.gradient is not None and self._elements is not None and not torch.equal(self.gradient, self._elements):
            self.gradient.data.copy_(self._elements)
        set_gradient_hooks(owner, self._hooks, self._held)


def _place_of(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Return which data a strided tensor has, whatever their elements are."""
    return storage_number(tensor), tensor.dtype, tensor.shape, tensor.stride(), tensor.storage_offset()


class Variables(Attributes):
    """Those global variables of a Python module that the model's code mentions."""

    def __init__(self, owner: dict[str, Any], names: frozenset[str]) -> None:
        self.names = names
        super().__init__(owner, str(owner.get("__name__", "__main__")))

    def now(self) -> dict[str, Any]:
        return {key: self.owner[key] for key in self.names if key in self.owner}

    def set(self, key: str, value: Any) -> None:
        self.owner[key] = value

    def delete(self, key: str) -> None:
        del self.owner[key]


class Cells(Attributes):
    """The closure variables of a function."""

    def __init__(self, owner: types.FunctionType) -> None:
        self.cells = dict(zip(owner.__code__.co_freevars, owner.__closure__ or (), strict=True))
        super().__init__(owner, owner.__qualname__)

    def now(self) -> dict[str, Any]:
        return {key: value for key, cell in self.cells.items() if (value := content(cell)) is not NOTHING}

    def set(self, key: str, value: Any) -> None:
        self.cells[key].cell_contents = value

    def delete(self, key: str) -> None:
        del self.cells[key].cell_contents

    def label(self, key: str) -> str:
        return f"{key}, a variable around {self.name}"


class Defaults(Attributes):
    """The default arguments of a function, by position or by name."""

    def __init__(self, owner: types.FunctionType, name: str) -> None:
        self._held = owner.__defaults__, bool(owner.__kwdefaults__)
        super().__init__(owner, name)

    def now(self) -> dict[str, Any]:
        return {**{str(i): each for i, each in enumerate(self.owner.__defaults__ or ())}, **(self.owner.__kwdefaults__ or {})}

    def same(self) -> bool:
        # a tuple cannot change; a dict of defaults by name can
        owner, (tuple_, by_name) = self.owner, self._held
        return (owner.__defaults__ is tuple_ and not by_name and not owner.__kwdefaults__) or super().same()

    def set(self, key: str, value: Any) -> None:
        if key in (named := self.owner.__kwdefaults__ or {}):
            named[key] = value
        else:
            defaults = list(self.owner.__defaults__)
            defaults[int(key)] = value
            self.owner.__defaults__ = tuple(defaults)

    def label(self, key: str) -> str:
        return self.name


class Slots(Attributes):
    """The slots of an object whose class has ``__slots__``."""

    def now(self) -> dict[str, Any]:
        # ``__slots__`` may also be one name as a string
        slots = [vars(kind).get("__slots__", ()) for kind in type(self.owner).__mro__]
        names = [name for each in slots for name in ((each,) if issubclass(type(each), str) else each)]
        own = [name for name in names if name not in ("__dict__", "__weakref__")]
        return {key: value for key in own if (value := _slot(self.owner, key)) is not NOTHING}

    def set(self, key: str, value: Any) -> None:
        object.__setattr__(self.owner, key, value)  # works for a frozen dataclass too

    def delete(self, key: str) -> None:
        object.__delattr__(self.owner, key)


class Items(Attributes):
    """The items of a dict. Methods that a user's subclass overrides are not called: they may have side effects."""

    size = -1  # after ``prepare_retrace``: how many items the forward left

    def now(self) -> dict[str, Any]:
        return self.owner if type(self.owner) in (dict, OrderedDict) else dict(_dict_of(self.owner).items(self.owner))

    def set(self, key: str, value: Any) -> None:
        _dict_of(self.owner).__setitem__(self.owner, key, value)

    def delete(self, key: str) -> None:
        _dict_of(self.owner).__delitem__(self.owner, key)

    def label(self, key: str) -> str:
        return self.name

    def left(self) -> list[str]:
        return [] if self.same() else [self.name]  # without a look at keys: the hash of a traced size adds to the graph

    def prepare_retrace(self) -> Iterator[str]:
        yield from super().prepare_retrace()
        self.size = len(self.read())

    def note(self) -> None:
        super().note()
        self.size = len(self.read())

    def hide(self) -> bool:
        hidden, self.size = super().hide(), -1
        return hidden and (len(self.read()) == len(self.content) or self.mark_counters())

    def mark_counters(self) -> bool:
        marked, now = super().mark_counters(), self.read()
        # a dict that is not the model's own may be in use by other threads
        if len(now) in (self.size, len(self.content)) or not self.name.startswith("self."):
            return marked
        self.fill({**now, **{StaleValue(): None for _ in range(_FAR)}})
        return True

    def restore(self) -> None:
        if not is_same(self.now(), self.content):
            self.fill(self.content)

    def fill(self, content: Any) -> None:
        """Replace all items."""
        base = _dict_of(self.owner)
        base.clear(self.owner)
        base.update(self.owner, content)


class Container(StatePlace):
    """The items of a list, set or deque. Methods that a user's subclass overrides are not called: they may have side effects."""

    size = 0  # after ``prepare_retrace``: how many items the forward left

    def __init__(self, owner: Any, name: str, holder: Attributes | None = None, key: str = "") -> None:
        """Note the items. ``holder``, ``key``: the place that has the container as an attribute or variable, and its name there."""
        self.holder, self.key = holder, key
        super().__init__(owner, name)

    def read(self) -> list[Any]:
        return list(_base(self.owner).__iter__(self.owner))

    def same(self) -> bool:
        now = self.read()
        return len(now) == len(self.content) and all(map(is_, now, self.content))

    def prepare_retrace(self) -> Iterator[str]:
        if self.same():
            return
        # what the forward put in may be proxies, which mean nothing in another trace; a table made of sizes is made again
        old, now = set(map(id, self.content)), self.read()
        has_places = len(now) == len(self.content) and not issubclass(_base(self.owner), set)
        earlier = self.content if has_places else [StaleValue()] * len(now)
        items = zip(now, earlier, strict=True)
        self.fill([item if is_plain(item) or id(item) in old else StaleValue() if _is_state(item) else was for item, was in items])
        self.size = len(self.read())
        if not self.same():
            yield self.name

    def note(self) -> None:
        self.size = len(self.read())

    def hide(self) -> bool:
        self.size = -1
        return self.same() or self.mark_counters()

    def mark_counters(self) -> bool:
        if self.same() or len(self.read()) == self.size:
            return False
        if self.holder is not None and self.holder.read().get(self.key) is self.owner and type(self.owner) is _base(self.owner):
            self.holder.set(self.key, changing(self.owner))
        elif not self.name.startswith("self."):  # others may use it meanwhile
            return False
        else:  # what holds it is not known: a length that no later call has for a long time
            self.fill([*self.read(), *(StaleValue() for _ in range(_FAR))])
        return True

    def restore(self) -> None:
        if not self.same():
            self.fill(self.content)

    def fill(self, content: Any) -> None:
        """Replace all items."""
        base = _base(self.owner)
        base.clear(self.owner)
        base.update(self.owner, content) if issubclass(type(self.owner), set) else base.extend(self.owner, content)


def _dict_of(value: dict[Any, Any]) -> type[dict[Any, Any]]:
    """Return the class of Python's library that a dict inherits from: OrderedDict or dict."""
    return OrderedDict if issubclass(type(value), OrderedDict) else dict


def _base(value: Any) -> Any:
    """Return the class of Python's library that a container inherits from: list, set or deque."""
    return next(kind for kind in (list, set, deque) if issubclass(type(value), kind))


class FunctionCache(StatePlace):
    """The cache of a function (``functools.lru_cache``). What a trace has put into it must not be what the model finds there later.

    Entries with proxies or other stand-ins are removed; all others stay, since a program may keep its only copy of something there. Of a
    cache with a limit no single entry can be removed, so it is emptied if it has one with a stand-in.
    """

    def read(self) -> int:
        return int(self.owner.cache_info().misses)

    def left(self) -> list[str]:
        return []  # what a cache has, its function computes again

    def prepare_retrace(self) -> Iterator[str]:
        self.restore()
        yield from ()

    def restore(self) -> None:
        if self.read() == self.content:
            return
        held = gc.get_referents(self.owner)
        if self.owner.cache_parameters()["maxsize"] is not None:
            if any(map(_holds_stand_in, held)):
                self.owner.cache_clear()
        else:
            for entries in held:
                if type(entries) is dict and entries is not vars(self.owner):
                    for key in [key for key, value in entries.items() if _holds_stand_in((key, value))]:
                        del entries[key]
        self.content = self.read()


def _holds_stand_in(value: Any, depth: int = 4) -> bool:
    kind = type(value)
    if issubclass(kind, (fx.Proxy, Attribute, StaleValue)) or (issubclass(kind, torch.Tensor) and is_fake(value)):
        return True
    if not depth or issubclass(kind, (type, types.ModuleType, types.FunctionType, torch.Tensor, torch.nn.Module)):
        return False
    if issubclass(kind, (tuple, list, set, frozenset, deque)):
        items: list[Any] = list(value)
    elif issubclass(kind, dict):
        items = [*value.keys(), *value.values()]
    else:
        items = list((own_attributes(value) or {}).values())
    return any(_holds_stand_in(item, depth - 1) for item in items)


class Memory(StatePlace):
    """The memory of a tensor or array. A trace cannot follow a write into this memory unless an operation of torch makes the write."""

    def read(self) -> bytes:
        array = self.owner
        if isinstance(array, torch.Tensor):
            plain = array.layout is torch.strided and array.device.type != "meta" and not array.is_quantized and array.numel()
            if not plain or is_fake(array):
                return b""
            # as bytes, since numpy has no bfloat16; without modes, which would record this
            with without_modes():
                return array.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        return b"" if array.dtype.hasobject else bytes(array.tobytes())

    def prepare_retrace(self) -> Iterator[str]:
        if self.read() != self.content:
            raise TraceError(
                f"the forward writes into {self.name}, an array or a tensor's memory, which a graph cannot do. Make it a buffer "
                "(register_buffer) and write it with operations of torch, or move that step into a submodule of its own, which then "
                "becomes an opaque module."
            )
        yield from ()

    def restore(self) -> None:
        if self.read() == self.content:
            return
        if issubclass(type(self.owner), torch.Tensor):
            flat = torch.frombuffer(bytearray(self.content), dtype=self.owner.dtype)
            self.owner.data.copy_(flat.reshape(self.owner.shape))
        else:
            self.owner[...] = type(self.owner)(self.owner.shape, self.owner.dtype, self.content)


def own_attributes(value: Any) -> Any:
    """Return what ``vars`` does, but without running code of the user's (``__getattribute__``, a property): None if there is nothing."""
    for kind in type(value).__mro__:
        found: Any = vars(kind).get("__dict__")
        if type(found) in _DICTS:
            return found.__get__(value)
    # whose class has no such descriptor
    return vars(value) if issubclass(type(value), threading.local) else None


def _slot(value: Any, name: str) -> Any:
    """Return the content of a slot, or NOTHING if it is empty. A ``__getattr__`` of the user's does not run."""
    try:
        return object.__getattribute__(value, name)
    except AttributeError:
        return NOTHING


def content(cell: types.CellType) -> Any:
    """Return the content of a closure cell, or NOTHING if it is empty."""
    try:
        return cell.cell_contents
    except ValueError:
        return NOTHING


def _is_state(value: Any) -> bool:
    """Return whether a value that the forward assigned, or an item of it, carries data to the next call. A value made of sizes does not."""
    if issubclass(type(value), Attribute) and value._node is None:  # to read its node would add one to the graph
        return value.attr not in SIZE_ATTRIBUTES and _is_state(value.root)
    if issubclass(type(value), fx.Proxy):
        return carries_data(value.node)
    if issubclass(type(value), (tuple, list)):
        return any(map(_is_state, value))
    if issubclass(type(value), dict):
        return any(map(_is_state, dict.values(value)))
    kind = type(value)
    own = kind.__module__.partition(".")[0] not in ("torch", "builtins", "graphreg") and not callable(value)
    return own and any(map(_is_state, (own_attributes(value) or {}).values()))


def carries_data(node: fx.Node, called: Callable[[fx.Node], str] = function_name) -> bool:
    """Return whether a value depends on the content of the graph's inputs, and not only on their sizes and dtypes.

    While torch.export traces, parameters and buffers are inputs of its graph, too, and no name
    distinguishes them from the model's inputs. So they count as inputs.

    Args:
        node: The node of the value.
        called: Returns the name of the function or method that a node calls.
    """
    waiting, seen = [node], set[fx.Node]()
    while waiting:
        current = waiting.pop()
        name = called(current)
        made = name.startswith("new_") or name.endswith("_like") or name in ("size", "dim")
        if current in seen or made or (name == "getattr" and current.args[1] in SIZE_ATTRIBUTES):
            continue
        if current.op == "placeholder":
            return True
        seen.add(current)
        # ``a.type_as(b)`` and ``a.to(b)`` ask for the dtype and device of ``b``
        waiting += current.all_input_nodes[: 1 if name in ("to", "type_as") else None]
    return False


def is_plain(value: Any) -> bool:
    """Return whether a value is a number, a string, bytes or None, or a container of such values."""
    kind = type(value)
    if issubclass(kind, (list, tuple, set, deque)):
        return all(map(is_plain, value))
    return all(map(is_plain, value.values())) if issubclass(kind, dict) else issubclass(kind, PLAIN)
