"""The proxies of a trace: values that know an in-place operator, buffers that know their shape."""

from __future__ import annotations

import dis
import functools
import operator
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.fx.proxy import Attribute

from graphreg.ir import IN_PLACE_NAMES, label_site, origin_now, scope_of

# Code that is nobody's model: it may ask the class of a proxy, and is told that it is one. Not functools: singledispatch asks there.
FOREIGN = sys.stdlib_module_names - {"__main__", "functools"} | {"torch", "graphreg", "numpy", "scipy", "pandas", "networkx", "sympy"}


def _asks(frame: types.FrameType) -> bool:
    """Whether code asks a class: torch's argument parser does so too, of what a function is called with, and takes a proxy for one."""
    code, place = frame.f_code, frame.f_globals
    by_name = "__class__" in code.co_names or ("isinstance" in code.co_names and "isinstance" not in place)
    return by_name or place.get("__name__") == "functools" or frame.f_lasti in _matches(code)


@functools.cache
def _matches(code: types.CodeType) -> frozenset[int]:
    """Where ``case Tensor():`` stands in it."""
    return frozenset(each.offset for each in dis.get_instructions(code) if each.opname == "MATCH_CLASS")


_ITS_OWN = ("tracer", "node")


def _assigned(name: str, what: str = "assigns") -> str:
    return f"it {what} .{name} of a traced value, which a graph cannot carry; make a new value, or write into it (x.copy_(...))"


class Part(Attribute):
    """What is read of a value by a dot, before it is known whether it is called."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("root", "attr", "_node", *_ITS_OWN):
            raise AttributeError(_assigned(name))
        self.__dict__[name] = value

    def __delattr__(self, name: str) -> None:
        raise AttributeError(_assigned(name, "deletes"))


class Value(fx.Proxy):
    """A value of the graph on which ``+=`` and its like are recorded as what they are.

    Without these methods Python falls back on ``+``, and whoever holds the value by another name (a skip connection, a
    view, the caller) does not see the write: fx traces another function than the model's, without a word.
    """

    @classmethod
    def of(cls, node: fx.Node, tracer: fx.Tracer) -> Value:
        """The value of a node that is being made; the node is told the line of the model that makes it."""
        if node.op != "placeholder":
            node.meta["origin"] = origin_now()
        return cls(node, tracer)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """What ``isinstance`` asks. ``type_inference.py`` answers the model's code. What comes here (``match``, and functions that were not
        found) is refused, because a proxy would take the wrong branch in silence."""
        if self.tracer.is_tuple(self.node):  # type: ignore[attr-defined]
            return tuple
        frame = sys._getframe(1)
        home = str(frame.f_globals.get("__name__", ""))
        if home.partition(".")[0] in FOREIGN or not _asks(frame):
            return type(self)
        raise TypeError(f"the class of the traced value {self.node.name!r} is asked, in {home}, where a trace cannot answer")

    def __getattr__(self, k: str) -> Part:
        if k in ("grad", "grad_fn"):  # None in one call and not in the next; no AttributeError, for getattr() with a default asks too
            raise TypeError(f"it reads .{k} of a tensor, which tells of the calls before and not of this one")
        return Part(self, k)

    def __setattr__(self, name: str, value: Any) -> None:
        """``x.requires_grad = True`` is what ``x.requires_grad_()`` is; everything else would be the proxy's alone, and lost."""
        if name in _ITS_OWN:
            self.__dict__[name] = value
        elif name == "requires_grad":
            made = self.tracer.create_proxy("call_method", "requires_grad_", (self, value), {})
            label_site(made.node, scope_of(made.node))
        else:
            raise AttributeError(_assigned(name))

    def __delattr__(self, name: str) -> None:
        raise AttributeError(_assigned(name, "deletes"))

    def _in_place(self, function: Callable[..., Any], other: Any) -> Any:
        if self.node in getattr(self.tracer, "sizes", ()):
            return NotImplemented  # a number: Python's own fallback is right
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    def __setitem__(self, key: Any, value: Any) -> None:
        Value.put(self.tracer, self, key, value)

    @staticmethod
    def put(tracer: Any, target: Any, key: Any, value: Any) -> None:
        """``target[key] = value`` is a write into the target, and no value that could have a name."""
        made = tracer.create_proxy("call_function", operator.setitem, (target, key, value), {})
        label_site(made.node, scope_of(made.node))

    # What Python itself asks of a number or a shape, which torch.fx has no answer to; see ``shape_decisions.py``.
    def __index__(self) -> int:
        return int(self._asked("an index", int))

    def __int__(self) -> int:
        return int(self._asked("int()", int, float))

    def __float__(self) -> float:
        return float(self._asked("float()", int, float))

    def __len__(self) -> int:
        return int(self.tracer.length(self))  # type: ignore[attr-defined]

    def __round__(self, *digits: Any) -> Any:
        return self.tracer.create_proxy("call_function", round, (self, *digits), {})

    def _asked(self, what: str, *kinds: type) -> Any:
        return self.tracer.ask(self, what, kinds)  # type: ignore[attr-defined]


def _add_in_place_operators() -> None:
    def method(function: Callable[..., Any]) -> Callable[[Value, Any], Any]:
        return lambda self, other: self._in_place(function, other)

    for name in IN_PLACE_NAMES:
        setattr(Value, f"__{name}__", method(getattr(operator, name)))


_add_in_place_operators()


class BufferProxy(Value):
    """A buffer in the graph, whose shape, dtype and device are still plain values."""

    def __init__(self, node: fx.Node, tracer: fx.Tracer, buffer: torch.Tensor) -> None:
        super().__init__(node, tracer)
        self.__dict__.update(shape=buffer.shape, ndim=buffer.ndim, dtype=buffer.dtype, device=buffer.device)

    def size(self, dim: int | None = None) -> Any:
        return self._shape if dim is None else self._shape[dim]

    def dim(self) -> int:
        return len(self._shape)

    def numel(self) -> int:
        return self._shape.numel()

    def __len__(self) -> int:
        return self._shape[0]

    @property
    def _shape(self) -> torch.Size:
        shape: torch.Size = self.__dict__["shape"]
        return shape
