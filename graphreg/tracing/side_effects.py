"""What a forward changes beside its values: attributes, lists, arrays, counters, default arguments; and putting that back.

A trace runs the forward, and a graph does none of this. What the forward leaves behind for its next call is kept for a moment, to
see whether a second trace comes out otherwise: then the graph would be wrong from its second call on.
"""

from __future__ import annotations

import inspect
import sys
import types
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx, nn

from graphreg.errors import TraceError
from graphreg.ir import SIZE_ATTRIBUTES, function_name
from graphreg.tracing.symbolic.proxies import FOREIGN

_REGISTERED = ("_parameters", "_buffers", "_modules")
_PLAIN = (int, float, complex, str, bytes, type(None))
_NOTHING = object()


class Before:
    """A model before its forward runs: its attributes, what is in their containers, in its classes and in default arguments."""

    def __init__(self, model: nn.Module) -> None:
        self.places: list[_Place] = []
        self._seen: set[int] = set()
        self._registered = [(m, {name: dict(m.__dict__[name]) for name in _REGISTERED}) for m in model.modules()]
        kinds: dict[type, None] = {}
        for path, module in model.named_modules():
            self._attributes(module, f"self.{path}" if path else "self")
            kinds |= {kind: None for kind in type(module).__mro__ if not _others(kind)}
        for kind in kinds:
            self._class(kind)

    def _attributes(self, owner: Any, name: str) -> None:
        self._seen.add(id(owner))
        self.places.append(_Attributes(owner, name))
        for key, value in list(vars(owner).items()):
            if key not in _REGISTERED:
                self._look(value, f"{name}.{key}", objects=isinstance(owner, nn.Module))

    def _class(self, kind: type) -> None:
        self.places.append(_Attributes(kind, kind.__name__))
        for name, value in list(vars(kind).items()):
            function = inspect.unwrap(value) if callable(value) else value
            if isinstance(function, types.FunctionType):
                for default in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
                    self._look(default, f"a default argument of {kind.__name__}.{name}")
            elif not isinstance(value, type):
                self._look(value, f"{kind.__name__}.{name}")

    def _look(self, value: Any, name: str, objects: bool = False) -> None:
        if type(value) is Gone or isinstance(value, _PLAIN) or id(value) in self._seen:
            return
        self._seen.add(id(value))
        if isinstance(value, (list, dict, set, deque)):
            self.places.append(_Container(value, name))
        if isinstance(value, (list, tuple, dict, deque)):
            for item in list(value.values() if isinstance(value, dict) else value):
                self._look(item, name, objects)
        elif type(value) is torch.Tensor or (type(value).__module__ == "numpy" and hasattr(value, "tobytes") and hasattr(value, "flags")):
            self.places.append(_Memory(value, name))
        elif objects and hasattr(value, "__dict__") and not isinstance(value, (nn.Module, type)) and not _others(type(value)):
            self._attributes(value, name)

    def changed(self) -> list[str]:
        """The names of what holds other numbers, texts or items now, which a later call may read. What a later trace could not read,
        values of this one, is put back already."""
        self._put_back_registered()
        return list(dict.fromkeys(name for place in self.places for name in place.settle()))

    def tables(self) -> bool:
        """Whether the forward has assigned tensors of its own making to attributes; asked after ``changed``."""
        return any(place.tensors for place in self.places if isinstance(place, _Attributes))

    def moved(self) -> list[str]:
        """The names of those attributes that another trace has assigned other numbers to."""
        return [name for place in self.places if isinstance(place, _Attributes) for name in place.moved()]

    def counting(self) -> bool:
        """Whether a number has changed since ``changed`` was asked: it is a count then, and from now on tells who decides by it."""
        return any([place.count() for place in self.places if isinstance(place, _Attributes)])  # noqa: C419  # of all of them

    def put_back(self) -> None:
        self._put_back_registered()
        for place in self.places:
            place.put_back()

    def _put_back_registered(self) -> None:
        for module, registered in self._registered:
            for name, content in registered.items():
                now = module.__dict__[name]  # the dict itself stays, others may hold it; compared by identity, for it may hold proxies
                if [(k, id(v)) for k, v in now.items()] != [(k, id(v)) for k, v in content.items()]:
                    now.clear()
                    now.update(content)


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


class _Place:
    """One thing that a forward may change. ``settle`` names what changed and stays for another trace."""

    def __init__(self, owner: Any, name: str) -> None:
        self.owner, self.name = owner, name
        self.content = self.read()

    def read(self) -> Any:
        raise NotImplementedError

    def settle(self) -> Iterator[str]:
        raise NotImplementedError

    def put_back(self) -> None:
        raise NotImplementedError


class _Attributes(_Place):
    """Of a module, a class, an object."""

    def read(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self.owner).items() if key not in _REGISTERED}

    def _changed(self) -> Iterator[str]:
        now = self.read()
        return (key for key in {**self.content, **now} if now.get(key, _NOTHING) is not self.content.get(key, _NOTHING))

    def settle(self) -> Iterator[str]:
        self.kept, self.tensors = dict[str, Any](), dict[str, torch.Tensor]()
        for key in list(self._changed()):
            value = vars(self.owner).get(key, _NOTHING)
            if type(value) is torch.Tensor and not isinstance(self.owner, type):
                self.tensors[key] = value  # made by the forward: a table that it keeps, or a sum
                continue
            if _is_plain(value):
                self.kept[key] = value
            elif not isinstance(self.owner, type) and _is_state(value, self.content.get(key)):
                vars(self.owner)[key] = Gone()
            else:
                self._restore(key)
                continue
            yield f"{self.name}.{key}"

    def moved(self) -> Iterator[str]:
        for key, then in self.tensors.items():
            now = vars(self.owner).get(key)
            same = type(now) is torch.Tensor and now.shape == then.shape and now.dtype == then.dtype and torch.equal(now, then)
            if now is not then and not same:
                yield f"{self.name}.{key}"

    def put_back(self) -> None:
        for key in list(self._changed()):
            self._restore(key)

    def _restore(self, key: str) -> None:
        if isinstance(self.owner, type):
            setattr(self.owner, key, self.content[key]) if key in self.content else delattr(self.owner, key)
        elif key in self.content:
            vars(self.owner)[key] = self.content[key]
        else:
            del vars(self.owner)[key]

    def count(self) -> bool:
        found = False
        for key, then in self.kept.items():
            now = vars(self.owner).get(key)
            if type(now) in (int, float) and now != then:
                setattr(self.owner, key, Count(now))
                found = True
        return found


class _Container(_Place):
    def read(self) -> Any:
        return dict(self.owner) if isinstance(self.owner, dict) else list(self.owner)

    def _same(self) -> bool:
        now, then = self.read(), self.content
        if isinstance(now, dict):
            return list(map(id, now)) == list(map(id, then)) and list(map(id, now.values())) == list(map(id, then.values()))
        return list(map(id, now)) == list(map(id, then))

    def settle(self) -> Iterator[str]:
        if self._same():
            return
        now, then = self.read(), self.content
        if isinstance(self.owner, dict):
            kept = {key: value for key, value in now.items() if _is_plain(value)}
            other = {key: value for key, value in then.items() if key not in kept}
            self._fill({**other, **kept})
        else:
            old = set(map(id, then))
            self._fill([item if _is_plain(item) or id(item) in old else Gone() for item in now])
        if not self._same():
            yield self.name

    def put_back(self) -> None:
        if not self._same():
            self._fill(self.content)

    def _fill(self, content: Any) -> None:
        self.owner.clear()
        self.owner.update(content) if isinstance(self.owner, (dict, set)) else self.owner.extend(content)


class _Memory(_Place):
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


def _is_state(value: Any, before: Any) -> bool:
    """Whether an attribute that was assigned carries data to the next call; a table that is made once and kept does not."""
    if isinstance(value, fx.Proxy):
        return carries_data(value.node)
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


def _is_plain(value: Any) -> bool:
    kind = type(value)
    if issubclass(kind, (list, tuple, set, deque)):
        return all(map(_is_plain, value))
    return all(map(_is_plain, value.values())) if issubclass(kind, dict) else issubclass(kind, _PLAIN)


def _others(kind: type) -> bool:
    """Whether a class is nobody's model code."""
    return kind.__module__.partition(".")[0] in FOREIGN
