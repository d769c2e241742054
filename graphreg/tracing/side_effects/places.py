"""The places that a forward may change, with what was in them: attributes, variables, containers, memory."""
from __future__ import annotations

import sys
import types
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx

from graphreg.errors import TraceError
from graphreg.ir import SIZE_ATTRIBUTES, function_name
from graphreg.torch_internals import is_fake
from graphreg.tracing.symbolic.proxies import FOREIGN

REGISTERED = ("_parameters", "_buffers", "_modules")
PLAIN = (int, float, complex, str, bytes, type(None))
NOTHING = object()


class Place:
    """One thing that a forward may change, with its content from before: an attribute, a variable, a container, a generator."""

    def __init__(self, owner: Any, name: str) -> None:
        self.owner, self.name = owner, name
        self.content = self.read()

    def read(self) -> Any:
        """The content now, in a form that can be compared with ``content``."""
        raise NotImplementedError

    def settle(self) -> Iterator[str]:
        """Make the place ready for another trace: numbers and texts stay as the forward left them, values of the trace go back.

        Gives the names of what stays changed. Raises TraceError for what can be neither kept nor put back.
        """
        raise NotImplementedError

    def put_back(self) -> None:
        """Give the place the content that it had before the forward ran."""
        raise NotImplementedError


class Attributes(Place):
    """Of a module, a class, an object, a function."""

    def read(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self.owner).items() if key not in REGISTERED}

    def set(self, key: str, value: Any) -> None:
        if isinstance(self.owner, type):
            setattr(self.owner, key, value)
        else:
            vars(self.owner)[key] = value

    def delete(self, key: str) -> None:
        if isinstance(self.owner, type):
            delattr(self.owner, key)
        else:
            del vars(self.owner)[key]

    def label(self, key: str) -> str:
        return f"{self.name}.{key}"

    def changed(self) -> list[str]:
        now = self.read()
        return [key for key in {**self.content, **now} if now.get(key, NOTHING) is not self.content.get(key, NOTHING)]

    def settle(self) -> Iterator[str]:
        self.kept, self.tensors = dict[str, Any](), dict[str, torch.Tensor]()
        now = self.read()
        for key in self.changed():
            value = now.get(key, NOTHING)
            if _is_table(value) and not isinstance(self.content.get(key), torch.Tensor):
                self.set(key, value := torch.zeros(tuple(value.shape), dtype=value.dtype, device=value.device))
            if type(value) is torch.Tensor and not isinstance(self.owner, type):
                self.tensors[key] = value  # made by the forward: a table that it keeps, or a sum
                continue
            if is_plain(value):
                self.kept[key] = value
            elif not isinstance(self.owner, type) and (_is_state(value) or _both_tensors(value, self.content.get(key))):
                self.set(key, Gone())
            else:
                self._restore(key)
                continue
            yield self.label(key)

    def moved(self) -> Iterator[str]:
        now = self.read()
        for key, then in self.tensors.items():
            value = now.get(key)
            same = type(value) is torch.Tensor and value.shape == then.shape and value.dtype == then.dtype and torch.equal(value, then)
            if value is not then and not same:
                yield self.label(key)

    def put_back(self) -> None:
        for key in self.changed():
            self._restore(key)

    def _restore(self, key: str) -> None:
        if key in self.content:
            self.set(key, self.content[key])
        else:
            self.delete(key)

    def count(self) -> bool:
        found, read = False, self.read()
        for key, then in self.kept.items():
            now: Any = read.get(key)
            if type(now) in (int, float) and now != then:
                self.set(key, Count(now))
                found = True
        return found


class Variables(Attributes):
    """Global variables, those of these names."""

    def __init__(self, owner: dict[str, Any], names: frozenset[str]) -> None:
        self.names = names
        super().__init__(owner, str(owner.get("__name__", "__main__")))

    def read(self) -> dict[str, Any]:
        return {key: self.owner[key] for key in self.names if key in self.owner}

    def set(self, key: str, value: Any) -> None:
        self.owner[key] = value

    def delete(self, key: str) -> None:
        del self.owner[key]


class Cells(Attributes):
    """The variables of the functions around a function."""

    def __init__(self, owner: types.FunctionType) -> None:
        self.cells = dict(zip(owner.__code__.co_freevars, owner.__closure__ or (), strict=True))
        super().__init__(owner, owner.__qualname__)

    def read(self) -> dict[str, Any]:
        return {key: value for key, cell in self.cells.items() if (value := content(cell)) is not NOTHING}

    def set(self, key: str, value: Any) -> None:
        self.cells[key].cell_contents = value

    def delete(self, key: str) -> None:
        del self.cells[key].cell_contents

    def label(self, key: str) -> str:
        return f"{key}, a variable around {self.name}"


class Slots(Attributes):
    """Of an object whose class has ``__slots__``."""

    def read(self) -> dict[str, Any]:
        names = (each for kind in type(self.owner).__mro__ for each in _listed(vars(kind).get("__slots__", ())))
        return {key: value for key in names if (value := getattr(self.owner, key, NOTHING)) is not NOTHING}

    def set(self, key: str, value: Any) -> None:
        object.__setattr__(self.owner, key, value)  # of a frozen dataclass, too

    def delete(self, key: str) -> None:
        object.__delattr__(self.owner, key)


class Items(Attributes):
    """Of a dict. Its class's own methods are not called: they may do more than hold."""

    def read(self) -> dict[str, Any]:
        return dict(_dict_of(self.owner).items(self.owner))

    def set(self, key: str, value: Any) -> None:
        _dict_of(self.owner).__setitem__(self.owner, key, value)

    def delete(self, key: str) -> None:
        _dict_of(self.owner).__delitem__(self.owner, key)

    def label(self, key: str) -> str:
        return self.name

    def put_back(self) -> None:
        now, then = self.read(), self.content
        if [(id(key), id(value)) for key, value in now.items()] != [(id(key), id(value)) for key, value in then.items()]:
            self.fill(then)

    def fill(self, content: Any) -> None:
        base = _dict_of(self.owner)
        base.clear(self.owner)
        base.update(self.owner, content)


class Container(Place):
    """A list, a set, a deque. Its class's own methods are not called."""

    def read(self) -> list[Any]:
        return list(_base(self.owner).__iter__(self.owner))

    def _same(self) -> bool:
        return list(map(id, self.read())) == list(map(id, self.content))

    def settle(self) -> Iterator[str]:
        if self._same():
            return
        old = set(map(id, self.content))
        self.fill([item if is_plain(item) or id(item) in old else Gone() for item in self.read()])
        if not self._same():
            yield self.name

    def put_back(self) -> None:
        if not self._same():
            self.fill(self.content)

    def fill(self, content: Any) -> None:
        base = _base(self.owner)
        base.clear(self.owner)
        base.update(self.owner, content) if isinstance(self.owner, set) else base.extend(self.owner, content)


def _dict_of(value: dict[Any, Any]) -> type[dict[Any, Any]]:
    return OrderedDict if isinstance(value, OrderedDict) else dict


def _base(value: Any) -> Any:
    """The class of Python's own that a container is of."""
    return next(kind for kind in (list, set, deque) if isinstance(value, kind))


class Memory(Place):
    """Of a tensor, an array. No trace follows a write into it that goes by other ways than torch's operations."""

    def read(self) -> bytes:
        array = self.owner
        if isinstance(array, torch.Tensor):
            plain = array.layout is torch.strided and array.device.type != "meta" and not array.is_quantized and array.numel()
            return array.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes() if plain else b""
        return b"" if array.dtype.hasobject else bytes(array.tobytes())

    def settle(self) -> Iterator[str]:
        if self.read() != self.content:
            raise TraceError(
                f"the forward writes into {self.name}, an array or a tensor's memory, and no graph does so. Make it a buffer "
                "(register_buffer) that is written by operations of torch, or move that step into a submodule that is kept whole."
            )
        yield from ()

    def put_back(self) -> None:
        if self.read() == self.content:
            return
        if isinstance(self.owner, torch.Tensor):
            flat = torch.frombuffer(bytearray(self.content), dtype=self.owner.dtype)
            self.owner.data.copy_(flat.reshape(self.owner.shape))
        else:
            self.owner[...] = type(self.owner)(self.owner.shape, self.owner.dtype, self.content)


def content(cell: types.CellType) -> Any:
    """What is in a cell; a mark where nothing is."""
    try:
        return cell.cell_contents
    except ValueError:
        return NOTHING


def _listed(slots: Any) -> tuple[str, ...]:
    names = (slots,) if isinstance(slots, str) else tuple(slots)
    return tuple(name for name in names if name not in ("__dict__", "__weakref__"))


def _is_state(value: Any) -> bool:
    """Whether what was assigned carries data to the next call, itself or in what it holds; a table that is made once and kept does not."""
    if isinstance(value, fx.Proxy):
        return carries_data(value.node)
    if isinstance(value, (tuple, list)):
        return any(map(_is_state, value))
    if isinstance(value, dict):
        return any(map(_is_state, dict.values(value)))
    kind = type(value)
    own = kind.__module__.partition(".")[0] not in ("torch", "builtins", "graphreg") and not callable(value)
    return own and any(map(_is_state, getattr(value, "__dict__", {}).values()))


def _is_table(value: Any) -> bool:
    """Whether it is a tensor of torch.export's of a fixed size: one that can be read takes its place, as the forward would find one."""
    return isinstance(value, torch.Tensor) and is_fake(value) and all(type(size) is int for size in value.shape)


def _both_tensors(value: Any, before: Any) -> bool:
    return isinstance(value, torch.Tensor) and isinstance(before, torch.Tensor)


def carries_data(node: fx.Node, called: Callable[[fx.Node], str] = function_name) -> bool:
    """Whether what is in the model's inputs enters a value, not their sizes and dtypes alone. ``called``: what a node calls, by name."""
    waiting, seen = [node], set[fx.Node]()
    while waiting:
        current = waiting.pop()
        name = called(current)
        made = name.startswith("new_") or name.endswith("_like") or name in ("size", "dim")
        if current in seen or made or (name == "getattr" and current.args[1] in SIZE_ATTRIBUTES):
            continue
        if current.op == "placeholder":
            if current.name.startswith(("p_", "b_", "c_")):  # torch.export's parameters, buffers and constants
                continue
            return True
        seen.add(current)
        waiting += current.all_input_nodes
    return False


def is_plain(value: Any) -> bool:
    kind = type(value)
    if issubclass(kind, (list, tuple, set, deque)):
        return all(map(is_plain, value))
    return all(map(is_plain, value.values())) if issubclass(kind, dict) else issubclass(kind, PLAIN)




class Gone:
    """Stands for a value of an earlier trace in a list; whoever does more with it than count it is told."""

    def _refuse(self, *args: Any) -> Any:
        raise TypeError("the forward reads what an earlier call of it left behind")

    def __deepcopy__(self, memo: Any) -> Gone:
        return self

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """What ``isinstance`` asks: the model's code is refused, torch.fx's, which looks through all attributes, is told."""
        frame = sys._getframe(1)
        # type_inference asks for the model's code
        while frame.f_back is not None and frame.f_globals.get("__name__") == "graphreg.tracing.type_inference":
            frame = frame.f_back
        if str(frame.f_globals.get("__name__")).partition(".")[0] not in FOREIGN:
            self._refuse()
        return Gone

    __getattr__ = __add__ = __radd__ = __mul__ = __rmul__ = __sub__ = __rsub__ = __getitem__ = __iter__ = __len__ = __bool__ = _refuse


class Count(int):
    """A number that each call changes. It can be counted on and shown; whoever decides or computes by it is told."""

    def __add__(self, other: int) -> Count:
        return Count(int.__add__(self, other))

    __radd__ = __add__

    def __sub__(self, other: int) -> Count:
        return Count(int.__sub__(self, other))

    def _refuse(self, *args: Any) -> Any:
        raise TypeError("the forward decides or computes by a number that each call changes")

    __lt__ = __le__ = __gt__ = __ge__ = __eq__ = __ne__ = __bool__ = __mul__ = __rmul__ = __rsub__ = _refuse
    __mod__ = __rmod__ = __floordiv__ = __rfloordiv__ = __truediv__ = __rtruediv__ = __pow__ = __rpow__ = _refuse
    __index__ = __int__ = __float__ = __divmod__ = __and__ = __or__ = __neg__ = __abs__ = _refuse
    __hash__ = int.__hash__
