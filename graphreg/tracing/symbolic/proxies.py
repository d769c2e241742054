"""The proxies of a symbolic trace. They record in-place operators as in-place, and the proxy of a buffer has the buffer's shape."""

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

from graphreg.ir import FOREIGN, IN_PLACE_NAMES, label_site, origin_now, scope_of
from graphreg.tracing.tensors import LEFT_IN_TENSORS, reads_what_is_left
from graphreg.tracing.type_inference import ATTRIBUTES


def _tests_class(frame: types.FrameType) -> bool:
    """Return whether the Python code of a frame, in which ``__class__`` was read, may be checking a class.

    Otherwise the reader was torch's argument parser, C++ code without a frame of its own, which must get the proxy's class.
    """
    code, place = frame.f_code, frame.f_globals
    by_name = "__class__" in code.co_names or ("isinstance" in code.co_names and "isinstance" not in place)
    return by_name or place.get("__name__") == "functools" or frame.f_lasti in _class_patterns(code)


@functools.cache
def _class_patterns(code: types.CodeType) -> frozenset[int]:
    """Return the offsets of class patterns (``case Tensor():``) in code."""
    return frozenset(each.offset for each in dis.get_instructions(code) if each.opname == "MATCH_CLASS")


_FIELDS = ("tracer", "node")


def _assignment_message(name: str, what: str = "assigns") -> str:
    """Return the error message for code that assigns or deletes an attribute of a traced value."""
    return f"it {what} .{name} of a traced value, which a graph cannot carry; make a new value, or write into it (x.copy_(...))"


class AttributeProxy(Attribute):
    """An attribute of a traced value. Whether the attribute is a method shows only when the model's code calls it."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("root", "attr", "_node", *_FIELDS):
            raise AttributeError(_assignment_message(name))
        self.__dict__[name] = value

    def __delattr__(self, name: str) -> None:
        raise AttributeError(_assignment_message(name, "deletes"))

    def __hash__(self) -> int:
        """Return the hash of a shape, a dtype or the like, for a dict or set. The graph asserts that each call has the hashed value."""
        if self.attr in ATTRIBUTES and not issubclass(ATTRIBUTES[self.attr], torch.Tensor):
            return hash(self.tracer.concrete(self, "a key", (ATTRIBUTES[self.attr],)))  # type: ignore[attr-defined]
        return object.__hash__(self)


class Value(fx.Proxy):
    """The proxy of a value. It records ``+=`` and other in-place operators as in-place.

    Without methods for them, Python would fall back to ``+``, which makes a new value. The write would not reach other uses of the same
    tensor (a skip connection, a view, the caller's variable), and torch.fx would silently trace another function than the model's.
    """

    @classmethod
    def of(cls, node: fx.Node, tracer: fx.Tracer) -> Value:
        """Return the proxy of a new node, and note the present line of the model's code in the node's ``meta``."""
        if node.op != "placeholder":
            node.meta["origin"] = origin_now()
        return cls(node, tracer)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """The class that ``isinstance`` sees.

        ``isinstance_patch.py`` answers ``isinstance`` in the model's code. Other class checks of the model (``match``, code that the
        patch did not find) read this property. It then raises, because a proxy would silently take the wrong branch.
        """
        if self.tracer.is_tuple(self.node):  # type: ignore[attr-defined]
            return tuple
        frame = sys._getframe(1)
        home = str(frame.f_globals.get("__name__", ""))
        if home.partition(".")[0] in FOREIGN or not _tests_class(frame):
            return type(self)
        raise TypeError(f"{home} checks the class of the traced value {self.node.name!r} in a way that a trace cannot answer")

    def __getattr__(self, k: str) -> AttributeProxy:
        if k in LEFT_IN_TENSORS:  # not an AttributeError, because getattr() with a default would catch it
            raise TypeError(reads_what_is_left(k))
        return AttributeProxy(self, k)

    def __setattr__(self, name: str, value: Any) -> None:
        """Record ``x.requires_grad = True`` as ``x.requires_grad_()``; refuse other attributes, which would be lost with the proxy."""
        if name in _FIELDS:
            self.__dict__[name] = value
        elif name == "requires_grad":
            made = self.tracer.create_proxy("call_method", "requires_grad_", (self, value), {})
            label_site(made.node, scope_of(made.node))
        else:
            raise AttributeError(_assignment_message(name))

    def __delattr__(self, name: str) -> None:
        raise AttributeError(_assignment_message(name, "deletes"))

    def _in_place(self, function: Callable[..., Any], other: Any) -> Any:
        """Record an in-place operator."""
        if self.node in getattr(self.tracer, "sizes", ()):
            return NotImplemented  # the value is a number: Python falls back to ``+``, which is right for numbers
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    def __setitem__(self, key: Any, value: Any) -> None:
        Value.set_item(self.tracer, self, key, value)

    @staticmethod
    def set_item(tracer: Any, target: Any, key: Any, value: Any) -> None:
        """Record ``target[key] = value``. The node has no label, because it is a write into the target and no value."""
        made = tracer.create_proxy("call_function", operator.setitem, (target, key, value), {})
        label_site(made.node, scope_of(made.node))

    # Methods that Python calls on a number or a shape, and that torch.fx does not support; see ``shape_decisions.py``.
    def __index__(self) -> int:
        return int(self._concrete("an index", int))

    def __int__(self) -> int:
        return int(self._concrete("int()", int, float))

    def __float__(self) -> float:
        return float(self._concrete("float()", int, float))

    def __len__(self) -> int:
        return int(self.tracer.length(self))  # type: ignore[attr-defined]

    def __hash__(self) -> int:
        """Return the hash of a size, for a dict or set; the graph asserts that each call has this size. Hash a tensor by its identity."""
        if self.node in getattr(self.tracer, "sizes", ()) and not self.tracer.evaluating:  # type: ignore[attr-defined]
            return hash(self._concrete("a key", bool, int, float, tuple))
        return object.__hash__(self)

    def __round__(self, *digits: Any) -> Any:
        return self.tracer.create_proxy("call_function", round, (self, *digits), {})

    def _concrete(self, what: str, *kinds: type) -> Any:
        """Return the value that results from the example inputs; the graph asserts that each call has this value."""
        return self.tracer.concrete(self, what, kinds)  # type: ignore[attr-defined]


def _add_in_place_operators() -> None:
    """Give ``Value`` the methods of all in-place operators."""

    def method(function: Callable[..., Any]) -> Callable[[Value, Any], Any]:
        return lambda self, other: self._in_place(function, other)

    for name in IN_PLACE_NAMES:
        setattr(Value, f"__{name}__", method(getattr(operator, name)))


_add_in_place_operators()


class BufferProxy(Value):
    """The proxy of a buffer. Its shape, dtype and device are plain Python values."""

    def __init__(self, node: fx.Node, tracer: fx.Tracer, buffer: torch.Tensor) -> None:
        super().__init__(node, tracer)
        self.__dict__.update(shape=buffer.shape, ndim=buffer.ndim, dtype=buffer.dtype, device=buffer.device)

    def size(self, dim: int | None = None) -> Any:
        """Return the shape, or the size of one axis."""
        return self._shape if dim is None else self._shape[dim]

    def dim(self) -> int:
        """Return the number of axes."""
        return len(self._shape)

    def numel(self) -> int:
        """Return the number of elements."""
        return self._shape.numel()

    def __len__(self) -> int:
        return self._shape[0]

    @property
    def _shape(self) -> torch.Size:
        shape: torch.Size = self.__dict__["shape"]
        return shape
