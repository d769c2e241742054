"""Answers what a forward asks of a traced value, as the value itself would: whether it has an attribute, its class, its text.

Where the answer is certain for the operation that made the value, nothing else is needed. Otherwise the answer is that of the example
inputs, and the graph asserts it. If neither tells, the question raises TypeError: it would be answered wrongly.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import fx
from torch.fx.proxy import Attribute

from graphreg.ir import FOREIGN
from graphreg.torch_internals import is_guarded, pytree, reads_attribute
from graphreg.tracing.shape_decisions import UNKNOWN
from graphreg.tracing.type_inference import ATTRIBUTES, definite_type, is_tensor

_OF_TENSORS = frozenset(dir(torch.Tensor))
_TRACERS = ("graphreg", "torch.fx")
_TRACE = "graphreg.tracing.symbolic.symbolic"  # the code that starts a trace
_TEXTS = (bool, int, float, complex, str, tuple, list, dict, type(None), torch.dtype, torch.device, torch.layout)


def home_of(frame: types.FrameType) -> str:
    """Return the name of the Python module whose code runs in a frame."""
    return str(frame.f_globals.get("__name__", ""))


def is_foreign(frame: types.FrameType) -> bool:
    """Return whether a frame runs code of torch, graphreg, Python's library or the like, and not of a model."""
    return home_of(frame).partition(".")[0] in FOREIGN


def is_caught(frame: types.FrameType | None) -> bool:
    """Return whether the model's code may catch what is raised in a frame."""
    while frame is not None and home_of(frame) != _TRACE:
        if not is_foreign(frame) and is_guarded(frame):
            return True
        frame = frame.f_back
    return False


def class_of(value: Any) -> type:
    """Return the class of a traced value; raise TypeError if it is not known. The graph asserts an answer that is not certain."""
    kind = _certain_class(value) or value.tracer.kind(value.node)
    if kind is None:
        raise TypeError(f"the forward asks for the class of {value.node.name!r}, and the trace cannot tell it")
    return kind


def is_callable(value: Any) -> bool:
    """Do what ``callable`` does, also for traced values."""
    if not issubclass(type(value), fx.Proxy):
        return callable(value)
    if issubclass(type(value), Attribute):
        member = getattr(class_of(value.root), value.attr, None)
        return callable(member)
    return any("__call__" in vars(base) for base in class_of(value).__mro__)


def require_attribute(value: Any, name: str, frame: types.FrameType) -> None:
    """Raise AttributeError if a traced value has no attribute of this name.

    Args:
        value: The proxy.
        name: The attribute.
        frame: The frame that asks for it.

    Raises:
        AttributeError: The value has no such attribute. The graph asserts that, if it is not certain.
        TypeError: It is not known whether it has.
    """
    home = home_of(frame)
    if home.startswith(_TRACERS):
        return
    plain = reads_attribute(frame)  # and no function such as hasattr
    if name in _OF_TENSORS and plain and not is_guarded(frame):
        return
    kind = _certain_class(value)
    if kind is not None:
        if not hasattr(kind, name) and name != "__dict__":
            raise AttributeError(f"{kind.__name__!r} object has no attribute {name!r}")
        return
    asked = not plain or is_caught(frame)
    there, known = _example_has(value, name)
    if not known:
        if not asked:
            return  # what the value is shows at the calls
        if value.node.op != "placeholder" or value.tracer.examples:
            raise TypeError(f"the forward asks whether {value.node.name!r} has the attribute {name!r}, and the trace cannot tell")
        there = name in _OF_TENSORS
    if asked:
        value.tracer.assert_attribute(value.node, name, there)
    if not there:
        raise AttributeError(f"{value.node.name!r}, which is no stand-in for a value with such an attribute, has no attribute {name!r}")


def text_of(value: Any) -> Any:
    """Return what a traced size, dtype, device or the like is for the examples, to make a text of it. The graph asserts it."""
    kind = _certain_class(value) or value.tracer.kind_for_examples(value.node)
    if kind is not None and issubclass(kind, torch.Tensor):
        raise TypeError(f"the forward asks for the text of {value.node.name!r}, which depends on a tensor's values")
    made = value.tracer.concrete(value, "text", _TEXTS)
    if any(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(made)):
        raise TypeError(f"the forward asks for the text of {value.node.name!r}, which depends on a tensor's values")
    return made


def _certain_class(value: Any) -> type | None:
    """Return the class that a traced value certainly has, whatever the inputs; None if that is not certain."""
    tracer = value.tracer
    if issubclass(type(value), Attribute) and value.attr in ATTRIBUTES:
        return ATTRIBUTES[value.attr] if _is_certain_tensor(value.root, tracer) else None
    node = value.node
    kind = definite_type(node, tracer)
    if kind is None or (kind is tuple and not tracer.is_tuple(node)):  # it may be a named tuple of torch, as that of torch.max
        return None
    return kind


def _is_certain_tensor(root: Any, tracer: Any) -> bool:
    """Return whether a value is taken for a tensor. That of an argument without an example is, since it has a shape or the like."""
    known = tracer.known(root.node)
    if known is not UNKNOWN:
        return isinstance(known, torch.Tensor)
    return root.node.op == "placeholder" or is_tensor(root.node, tracer)


def _example_has(value: Any, name: str) -> tuple[bool, bool]:
    """Return whether a value has an attribute for the example inputs, and whether that is known."""
    example = value.tracer.known(value.node)
    if example is UNKNOWN:
        kind = value.tracer.kind_for_examples(value.node)
        return (False, False) if kind is None else (hasattr(kind, name), True)
    if isinstance(example, torch.Tensor):  # not by hasattr, because some attributes compute or warn
        return hasattr(type(example), name) or name in vars(example), True
    return hasattr(example, name), True

