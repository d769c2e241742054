"""Answers what a forward asks of a traced value, as the value itself would: whether it has an attribute, its class, its text.

Where the answer is certain for the operation that made the value, nothing else is needed. Otherwise
the answer is that of the example inputs, and the graph asserts it. If neither tells, the question
raises TypeError: it would be answered wrongly.
"""

from __future__ import annotations

import sys
import types
from typing import Any, NoReturn

import torch
from torch import fx
from torch.fx.proxy import Attribute

from graphreg.ir.operations import gives_tuple
from graphreg.torch_internals import pytree
from graphreg.torch_internals.bytecode import is_guarded, reads_attribute
from graphreg.tracing.frames import home_of, is_caught
from graphreg.tracing.shape_decisions import UNKNOWN
from graphreg.tracing.type_inference import ATTRIBUTES, definite_type, is_tensor

_OF_TENSORS = frozenset(dir(torch.Tensor))
_TRACERS = ("graphreg", "torch.fx")
_TEXTS = (bool, int, float, complex, str, tuple, list, dict, type(None), torch.dtype, torch.device, torch.layout)


def class_of(value: Any) -> type:
    """Return the class of a traced value; raise TypeError if it is not known. The graph asserts an answer that is not certain."""
    kind = _certain_class(value) or value.tracer.kind(value.node)
    if kind is None:
        value.tracer.refuse(TypeError(f"the forward asks for the class of {value.node.name!r}, and the trace cannot tell it"))
    return kind


def is_callable(value: Any) -> bool:
    """Do what ``callable`` does, also for traced values."""
    if not issubclass(type(value), fx.Proxy):
        return callable(value)
    if issubclass(type(value), Attribute):
        member = getattr(class_of(value.root), value.attr, None)
        return callable(member)
    return any("__call__" in vars(base) for base in class_of(value).__mro__)


def has_attribute(value: Any, name: str) -> bool:
    """Do what ``hasattr`` does, also for traced values: their stand-ins have attributes of their own, such as ``__call__``."""
    if not issubclass(type(value), fx.Proxy):
        return hasattr(value, name)
    try:
        require_attribute(value, name, sys._getframe(1))
    except AttributeError:
        return False
    return True


def require_attribute(value: Any, name: str, frame: types.FrameType) -> None:
    """Raise AttributeError if a traced value has no attribute of this name.

    Args:
        value: The proxy.
        name: The attribute.
        frame: The frame that asks for it.

    Raises:
        AttributeError: The value has no such attribute. The graph asserts that, if it is not
            certain.
        TypeError: It is not known whether it has.
    """
    home = home_of(frame)
    if home.startswith(_TRACERS):
        return
    plain = reads_attribute(frame)  # and no function such as hasattr
    if plain and not is_guarded(frame) and (name in _OF_TENSORS or not is_caught(frame, by_with=True)):
        # nothing is decided: where the value has no such attribute, the graph raises as the model
        # does
        return

    kind = _certain_class(value)
    # the model's, which may have any attribute
    own = kind is not None and issubclass(kind, torch.Tensor) and value.node.op == "get_attr"
    if kind is not None and not (own and not _class_has(kind, name)):
        if not _class_has(kind, name):
            raise AttributeError(f"{kind.__name__!r} object has no attribute {name!r}")
        return

    asked = not plain or is_caught(frame, by_with=True)
    there, known = _example_has(value, name)
    if not known:
        if not asked:
            return  # what the value is shows at the calls
        if value.node.op != "placeholder" or value.tracer.examples:
            why = f"the forward asks whether {value.node.name!r} has the attribute {name!r}, and the trace cannot tell"
            opaque = value.tracer.opaque.get(str(value.node.target)) if value.node.op == "call_module" else None
            value.tracer.refuse(TypeError(f"{why}: {value.node.target} is an opaque module ({opaque})" if opaque else why))
        there = name in _OF_TENSORS

    if asked:
        value.tracer.assert_attribute(value.node, name, there)
    if not there:
        raise AttributeError(f"{value.node.name!r}, which is no stand-in for a value with such an attribute, has no attribute {name!r}")


def text_of(value: Any) -> Any:
    """Return what a traced size, dtype, device or the like is for the examples, to make a text of it. The graph asserts it."""
    kind = _certain_class(value) or value.tracer.kind_for_examples(value.node)
    if kind is not None and issubclass(kind, torch.Tensor):
        _refuse_text(value)
    made = value.tracer.concrete(value, "text", _TEXTS)
    if any(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(made)):
        _refuse_text(value)
    return made


def _refuse_text(value: Any) -> NoReturn:
    why = (
        f"the forward asks for the text of {value.node.name!r}, which depends on a tensor's values; a function that torch.jit.script "
        "has compiled asks for it, too, if the forward calls the function"
    )
    value.tracer.refuse(TypeError(why))
    raise AssertionError(why)  # ``refuse`` always raises


def _certain_class(value: Any) -> type | None:
    """Return the class that a traced value certainly has, whatever the inputs; None if that is not certain."""
    tracer = value.tracer
    if issubclass(type(value), Attribute) and value.attr in ATTRIBUTES:
        return ATTRIBUTES[value.attr] if _is_certain_tensor(value.root, tracer) else None
    node = value.node
    kind = definite_type(node, tracer)
    # any other tuple may be a named tuple of torch, as that of torch.max
    if kind is None or (kind is tuple and not gives_tuple(node, tracer.operations.modules)):
        return None
    return kind


def _is_certain_tensor(root: Any, tracer: Any) -> bool:
    """Return whether a value is taken for a tensor. That of an argument without an example is, since it has a shape or the like."""
    known = tracer.known(root.node)
    if known is not UNKNOWN:
        return isinstance(known, torch.Tensor)
    return root.node.op == "placeholder" or is_tensor(root.node, tracer)


def _class_has(kind: type, name: str) -> bool:
    """Return whether a value of a class has an attribute. ``hasattr(kind, name)`` would count those of the class of ``kind``, too."""
    return any(name in vars(base) for base in kind.__mro__) or (name == "__dict__" and kind.__dictoffset__ != 0)


def _example_has(value: Any, name: str) -> tuple[bool, bool]:
    """Return whether a value of the model or of the example inputs has an attribute, and whether that is known."""
    example = value.tracer.known(value.node)
    if value.node.op == "get_attr":
        owner, _, own = value.node.target.rpartition(".")
        space = vars(value.tracer.root.get_submodule(owner))  # ``getattr`` gives a stand-in
        example = {**space, **space["_buffers"], **space["_parameters"]}.get(own, UNKNOWN)
    if example is UNKNOWN:
        kind = value.tracer.kind_for_examples(value.node)
        return (False, False) if kind is None else (_class_has(kind, name), True)
    if isinstance(example, torch.Tensor):  # not by hasattr, because some attributes compute or warn
        return _class_has(type(example), name) or name in vars(example), True
    return hasattr(example, name), True
