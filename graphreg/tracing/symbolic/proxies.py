"""The proxies of a symbolic trace. They record in-place operators as in-place, and the proxy of a buffer has the buffer's shape."""

from __future__ import annotations

import math
import operator
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import fx
from torch.fx.proxy import Attribute

from graphreg.ir.metadata import label_site, scope_of
from graphreg.ir.operations import IN_PLACE_NAMES
from graphreg.ir.source_location import origin_now
from graphreg.torch_internals.bytecode import matches_class, only_tells, unpacked
from graphreg.tracing.frames import home_of, is_caught, is_foreign
from graphreg.tracing.symbolic.questions import class_of, require_attribute, text_of
from graphreg.tracing.tensors import LEFT_IN_TENSORS, reads_what_is_left
from graphreg.tracing.type_inference import ATTRIBUTES, is_tensor

_FIELDS = ("tracer", "node")
# whose proxies read attributes on behalf of the model's code
_HOLDERS = "graphreg.tracing.symbolic.holders"
_COMPARED = ("dtype", "layout", "is_cuda")  # attributes with values that code may compare by ``is``


def _assignment_message(name: str, what: str = "assigns") -> str:
    """Return the error message for code that assigns or deletes an attribute of a traced value."""
    return f"it {what} .{name} of a traced value, which a graph cannot carry; make a new value, or write into it (x.copy_(...))"


def _asking(frame: Any) -> types.FrameType:
    """Return the frame of the code that asks something, which may do so through the proxy of a container."""
    while home_of(frame) == _HOLDERS:
        frame = frame.f_back
    return frame  # type: ignore[no-any-return]


def _attribute(value: Any, name: str) -> Any:
    """Return an attribute of a traced value, as the value itself would: raise AttributeError if it has none of this name."""
    # not an AttributeError, because getattr() with a default would catch it
    if name in LEFT_IN_TENSORS:
        raise TypeError(reads_what_is_left(name))
    frame = _asking(sys._getframe(2))
    try:
        require_attribute(value, name, frame)
    except AttributeError:
        # ``np.sqrt(x.shape[1])`` calls a method of this name
        if hasattr(math, name) and class_of(value) in (int, float):
            return partial(getattr(math, name), value)
        raise
    tracer = value.tracer
    # often None, which code tells from others by ``is``
    if name == "index" and getattr(value, "attr", "") == "device":
        return tracer.concrete(AttributeProxy(value, name), "a device's index", (int, type(None)))
    if name in ATTRIBUTES and name in _COMPARED and "identity" in tracer.asked and not is_foreign(frame):
        return tracer.concrete(AttributeProxy(value, name), "an operand of `is`", (ATTRIBUTES[name],))
    return SequenceAttribute(value, name) if name == "shape" and "sequence" in tracer.asked else AttributeProxy(value, name)


def _class(value: Any, frame: types.FrameType) -> type:
    """Return ``value.__class__`` for the code of a frame: the class of the traced value for a model, that of the proxy for torch."""
    if is_foreign(frame):
        return type(value)
    # If the frame's code checks no class, the reader was torch's argument parser, C++ code without
    # a frame of its own, which must get the proxy's class.
    code, place = frame.f_code, frame.f_globals
    by_name = "__class__" in code.co_names or ("isinstance" in code.co_names and "isinstance" not in place)
    checks = by_name or place.get("__name__") == "functools" or matches_class(frame)
    return class_of(value) if checks else type(value)


def _items(value: Any, frame: types.FrameType) -> Iterator[Any]:
    """Iterate over a traced value in the code of a frame."""
    frame = _asking(frame)
    taken = None if is_foreign(frame) else unpacked(frame)
    tracer = value.tracer
    return tracer.iter(value) if taken is None else tracer.unpack(value, taken, is_caught(frame))  # type: ignore[no-any-return]


def _decides_nothing(frame: types.FrameType) -> bool:
    """Return whether the text that a frame makes of a traced value goes to torch or to a reader, and to no decision of the model."""
    return is_foreign(frame) or only_tells(frame)


class _Asked:
    """What Python asks of a traced value without saying so to torch.fx. See ``questions.py``."""

    def __eq__(self, other: object) -> Any:
        """Record a comparison. After the trace, when a cache of a library may hold this value among its keys, compare by identity."""
        return self is other if getattr(self.tracer, "ended", False) else fx.Proxy.__eq__(self, other)

    __hash__ = object.__hash__

    def __getattr__(self, k: str) -> Any:
        return _attribute(self, k)

    def __delattr__(self, name: str) -> None:
        raise AttributeError(_assignment_message(name, "deletes"))

    def __dir__(self) -> list[str]:
        return object.__dir__(self) if is_foreign(sys._getframe(1)) else dir(class_of(self))  # type: ignore[return-value]

    def __iter__(self) -> Iterator[Any]:
        return _items(self, sys._getframe(1))

    def __repr__(self) -> str:
        return fx.Proxy.__repr__(self) if _decides_nothing(sys._getframe(1)) else repr(text_of(self))  # type: ignore[arg-type]

    def __str__(self) -> str:
        return fx.Proxy.__repr__(self) if _decides_nothing(sys._getframe(1)) else str(text_of(self))  # type: ignore[arg-type]

    def __format__(self, specification: str) -> str:
        if _decides_nothing(sys._getframe(1)):
            return fx.Proxy.__repr__(self)  # type: ignore[arg-type]
        return format(text_of(self), specification)

    def __contains__(self, item: Any) -> bool:
        return any(item is each or item == each for each in self)

    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError("the forward copies a traced value by copy.deepcopy; use x.clone()")

    # Methods that Python calls on a number or a shape, and that torch.fx does not support; see
    # ``shape_decisions.py``.
    def __index__(self) -> int:
        value = int(self._concrete("an index", int))
        self.tracer.index_asked(self.node, sys._getframe(1))
        return value

    def __int__(self) -> int:
        return int(self._concrete("int()", int, float))

    def __float__(self) -> float:
        return float(self._concrete("float()", int, float))

    def __len__(self) -> int:
        return int(self.tracer.length(self))

    def _concrete(self, what: str, *kinds: type) -> Any:
        """Return the value that results from the example inputs; the graph asserts that each call has this value."""
        return self.tracer.concrete(self, what, kinds)


_OF_DICTS = frozenset(("keys", "values", "items", "get"))


class AttributeProxy(_Asked, Attribute):
    """An attribute of a traced value. Whether the attribute is a method shows only when the model's code calls it."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.attr.startswith("register_") and self.attr.endswith("hook"):
            raise TypeError(f"it puts a hook on a traced value (by {self.attr}), which a graph cannot carry")
        root: Any = self.root
        if self.attr in _OF_DICTS and (keys := root.tracer.keys_of(root)) is not None:
            found = {key: root[key] for key in keys if self.attr != "get" or key == args[0]}
            return getattr(found, self.attr)(*args, **kwargs)
        return super().__call__(*args, **kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("root", "attr", "_node", *_FIELDS):
            raise AttributeError(_assignment_message(name))
        self.__dict__[name] = value

    def _in_place(self, function: Callable[..., Any], other: Any) -> Any:
        """Record an in-place operator of a view, such as ``z -= 1`` after ``z = x.mT``; a size or shape has none."""
        if self.attr in ATTRIBUTES:
            return NotImplemented
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    def __setitem__(self, key: Any, value: Any) -> None:
        if self.attr in ATTRIBUTES:
            raise TypeError(f"{self.attr!r} does not support item assignment")
        Value.set_item(self.tracer, self, key, value)

    def __hash__(self) -> int:
        """Return the hash of a shape, a dtype or the like, for a dict or set. The graph asserts that each call has the hashed value."""
        if self.attr in ATTRIBUTES and not issubclass(ATTRIBUTES[self.attr], torch.Tensor):
            return hash(self.tracer.concrete(self, "a key", (ATTRIBUTES[self.attr],)))  # type: ignore[attr-defined]
        return object.__hash__(self)


class Value(_Asked, fx.Proxy):
    """The proxy of a value. It records ``+=`` and other in-place operators as in-place.

    Without methods for them, Python would fall back to ``+``, which makes a new value. The write
    would not reach other uses of the same tensor (a skip connection, a view, the caller's
    variable), and torch.fx would silently trace another function than the model's.
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

        ``isinstance_patch.py`` answers ``isinstance`` and ``type`` in the model's code. Other class
        checks of the model (``match``, code that the patch did not find) read this property.
        """
        return _class(self, sys._getframe(1))

    @property
    def __dict__(self) -> dict[str, Any]:  # type: ignore[override]
        """The attributes that ``vars`` sees: none, since a tensor has none of its own."""
        frame = sys._getframe(1)
        if is_foreign(frame):
            return attributes_of(self)
        if not issubclass(class_of(self), torch.Tensor):
            why = f"the forward asks for the attributes of {self.node.name!r}, and the trace cannot tell them"
            self.tracer.refuse(TypeError(why))  # type: ignore[attr-defined]
        return {}

    def __setattr__(self, name: str, value: Any) -> None:
        """Record ``x.requires_grad = True`` as ``x.requires_grad_()``; refuse other attributes, which would be lost with the proxy."""
        if name in _FIELDS:
            attributes_of(self)[name] = value
        elif name == "requires_grad":
            made = self.tracer.create_proxy("call_method", "requires_grad_", (self, value), {})
            label_site(made.node, scope_of(made.node))
        else:
            raise AttributeError(_assignment_message(name))

    # torch.fx defines it for all values, and a tensor has none
    keys = property(lambda self: _attribute(self, "keys"))

    def _in_place(self, function: Callable[..., Any], other: Any) -> Any:
        """Record an in-place operator."""
        if self.node in getattr(self.tracer, "sizes", ()):
            # the value is a number: Python falls back to ``+``, which is right for numbers
            return NotImplemented
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    def __setitem__(self, key: Any, value: Any) -> None:
        Value.set_item(self.tracer, self, key, value)

    @staticmethod
    def set_item(tracer: Any, target: Any, key: Any, value: Any) -> None:
        """Record ``target[key] = value``. The node has no label, because it is a write into the target and no value."""
        made = tracer.create_proxy("call_function", operator.setitem, (target, key, value), {})
        label_site(made.node, scope_of(made.node))

    def __hash__(self) -> int:
        """Return the hash of a number or a shape, for a dict or set; the graph asserts that each call has it. Hash a tensor by identity."""
        tracer: Any = self.tracer
        if not hasattr(tracer, "sizes") or tracer.evaluating:
            return object.__hash__(self)
        is_asked = self.node not in tracer.sizes and not tracer.ended and not is_tensor(self.node, tracer)  # an argument, or its item
        if is_asked and issubclass(tracer.kind(self.node) or object, (int, float, complex)):
            tracer.sizes.add(self.node)
        return hash(self._concrete("a key", bool, int, float, complex, tuple)) if self.node in tracer.sizes else object.__hash__(self)

    def __divmod__(self, other: Any) -> tuple[Any, Any]:
        return self // other, self % other

    def __rdivmod__(self, other: Any) -> tuple[Any, Any]:
        return other // self, other % self

    def __round__(self, *digits: Any) -> Any:
        return self.tracer.create_proxy("call_function", round, (self, *digits), {})


# reads the attributes of a proxy itself
attributes_of: Callable[[Any], dict[str, Any]] = vars(fx.Proxy)["__dict__"].__get__


def _add_in_place_operators() -> None:
    """Give the proxies the methods of all in-place operators."""

    def method(function: Callable[..., Any]) -> Callable[[Any, Any], Any]:
        return lambda self, other: self._in_place(function, other)

    for name in IN_PLACE_NAMES:
        for kind in (Value, AttributeProxy):
            setattr(kind, f"__{name}__", method(getattr(operator, name)))


_add_in_place_operators()


class BufferProxy(Value):
    """The proxy of a buffer. Its shape, dtype and device are plain Python values."""

    def __init__(self, node: fx.Node, tracer: fx.Tracer, buffer: torch.Tensor) -> None:
        super().__init__(node, tracer)
        attributes_of(self).update(shape=buffer.shape, ndim=buffer.ndim, dtype=buffer.dtype, device=buffer.device)

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
        shape: torch.Size = attributes_of(self)["shape"]
        return shape


@Sequence.register
class SequenceAttribute(AttributeProxy):
    """A shape, for code that compares it with the pattern of a sequence (``case [n, c]:``). Python asks the class for that alone."""


@Sequence.register
class SequenceValue(Value):
    """The proxy of a tuple or list, or of a value of unknown type, for code that compares it with the pattern of a sequence.

    Python asks the class whether it may be a sequence, and then the value for its length, which
    raises if it is unknown.
    """


@Mapping.register
class UnknownMapping(Value):
    """The proxy of a value of unknown type, for code that compares it with the pattern of a mapping (``case {"q": q}:``).

    Python asks the class whether it may be a mapping, and then the value for its length, which
    raises.
    """
