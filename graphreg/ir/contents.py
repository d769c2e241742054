"""The contents of an argument that is not a tensor: as text, to compare them between calls, and as a copy, to keep them.

A graph is made for the contents that an argument had when the model was traced. The same object may have other contents at a later call.
"""

from __future__ import annotations

import argparse
import array
import copy
import sys
import types
from collections import deque
from enum import Enum
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from graphreg.errors import shown
from graphreg.torch_internals import graph_break, plain_number, pytree, traces_objects

# Packages that hold no code of a model. If their code asks for the class of a proxy, it gets the proxy's class; if a model's code asks,
# the trace raises an error. functools is left out, because singledispatch checks classes on behalf of the model.
FOREIGN = sys.stdlib_module_names - {"__main__", "functools"} | {"torch", "graphreg", "numpy", "scipy", "pandas", "networkx", "sympy"}

_DECIMAL = 1 << 60  # Python refuses to write whole numbers of thousands of digits in decimal; these are written in hexadecimal
_FIXED = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, Enum, range, type, types.FunctionType)
_NO_CONTENTS = (type, nn.Module, Tensor, types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.ModuleType)
_NAMESPACES = (types.SimpleNamespace, argparse.Namespace)
_ITEMS = (list, tuple, deque)
_SETS = (set, frozenset)
_BUFFERS = (bytearray, array.array)


def called_by_foreign_code() -> bool:
    """Return whether the code that called the caller belongs to torch, graphreg or another package of ``FOREIGN``, not to the model."""
    return str(sys._getframe(2).f_globals.get("__name__", "")).partition(".")[0] in FOREIGN


def contents_of(value: Any, within: tuple[Any, ...] = (), is_data: bool = True) -> str:
    """Return a text for an argument. Two values that a forward can tell apart have different texts. Dynamo traces this function.

    Args:
        value: The argument, or something in it.
        within: The containers and objects that contain the value, the outermost first.
        is_data: Whether tensors in the value are inputs of the graph. The text of an input has only its dtype and number of dimensions;
            the text of any other tensor also has its ``id``.
    """
    if isinstance(value, Tensor):
        return f"{value.dtype}[{value.dim()}]" + ("" if is_data else f" {id(value)}")
    if value is None or isinstance(value, (bool, str, torch.dtype, torch.device)):
        return repr(value)
    if isinstance(value, (int, float)) and not isinstance(value, Enum):
        return _number(value)
    kind = f"{type(value).__module__} {type(value).__qualname__}"
    if isinstance(value, Enum):
        return f"<{kind} {value.name}>"
    if True in (around := [value is each for each in within]):
        return f"<no. {around.index(True)} around it>"
    if isinstance(value, (*_ITEMS, *_SETS, dict)):
        return _items(value, (*within, value), is_data)
    if _has_memory(value):
        memory = value.tobytes() if hasattr(value, "tobytes") else bytes(value)  # bytes(n) of a number of numpy would be n zeros
        return f"<{kind} {getattr(value, 'dtype', '')} {getattr(value, 'shape', '')} {hash(memory)}>"
    if _is_fixed_value(value):
        return f"<{kind} {value!r}>"
    names = _attributes(value)
    if names is None:
        return f"<{kind} {id(value)}>"
    is_data = is_data and type(value) in pytree.SUPPORTED_NODES
    parts = [f"{name}={contents_of(getattr(value, name), (*within, value), is_data)}" for name in names]
    return f"<{kind} {', '.join(parts)}>"


def _number(value: Any) -> str:
    number = plain_number(value)
    if isinstance(number, int) and not -_DECIMAL < number < _DECIMAL:
        return f"{type(value).__name__} {int(number):#x}"
    return f"{type(value).__name__} {int(number) if isinstance(number, int) else float(number)!r}"


def _items(value: Any, within: tuple[Any, ...], is_data: bool) -> str:
    kind = "" if type(value) in (list, tuple, dict) else type(value).__name__
    if isinstance(value, dict):
        return kind + "{" + ", ".join([f"{contents_of(k)}: {contents_of(item, within, is_data)}" for k, item in value.items()]) + "}"
    texts = [contents_of(item, within, is_data) for item in value]
    if isinstance(value, _SETS):
        texts.sort()
    ends = "[]" if isinstance(value, list) else "()"
    return f"{kind}{ends[0]}{', '.join(texts)}{ends[1]}"


def _has_memory(value: Any) -> bool:
    """Return whether a value is a ``bytearray``, an ``array.array``, or an array or number of numpy."""
    return isinstance(value, _BUFFERS) or (type(value).__module__ == "numpy" and hasattr(value, "tobytes") and hasattr(value, "dtype"))


def _is_fixed_value(value: Any) -> bool:
    """Return whether a value counts as immutable: its class is from ``FOREIGN``, compares by value and has a hash, like a path."""
    kind = type(value)
    compares: Any = kind.__eq__
    return _is_foreign(kind) and compares is not object.__eq__ and kind.__hash__ is not None and not isinstance(value, _NO_CONTENTS)


def _attributes(value: Any) -> list[str] | None:
    """Return the names of an object's attributes, without cached properties; None if the object is compared by identity alone."""
    kind = type(value)
    if isinstance(value, _NO_CONTENTS) or (_is_foreign(kind) and not isinstance(value, _NAMESPACES)):
        return None
    slots = [base.__dict__.get("__slots__", ()) for base in kind.__mro__]
    named = [name for each in slots for name in ((each,) if isinstance(each, str) else each)]
    found = [name for name in named if name not in ("__dict__", "__weakref__") and hasattr(value, name)]
    if hasattr(value, "__dict__"):
        if torch.compiler.is_dynamo_compiling() and not traces_objects():
            graph_break(
                msg=f"an argument is an object of class {kind.__name__}. graphreg reads its attributes, and torch.compile traces that from "
                "torch 2.12 on. Leave fullgraph=True out, or pass what the forward reads of it as arguments of their own."
            )
        found += [name for name in value.__dict__ if not isinstance(getattr(kind, name, None), cached_property)]
    elif not named:
        return None
    return sorted(found)


def _is_foreign(kind: type) -> bool:
    return kind.__module__.partition(".")[0] in FOREIGN


def may_change(value: Any) -> bool:
    """Whether the contents of a value may change in place."""
    if isinstance(value, (tuple, frozenset)):
        return any(map(may_change, value))
    return not (isinstance(value, _FIXED) or _is_fixed_value(value))


def copied_contents(value: Any, copies: dict[int, Any] | None = None) -> Any:
    """Return a deep copy of a container or object. Tensors, modules, functions and immutable objects in it are shared, not copied."""
    copies = {} if copies is None else copies
    if id(value) in copies:
        return copies[id(value)]
    if isinstance(value, tuple):
        items = [copied_contents(item, copies) for item in value]
        return tuple(items) if type(value) is tuple else type(value)(*items) if hasattr(value, "_fields") else copy.copy(value)
    if isinstance(value, (*_FIXED, *_NO_CONTENTS)) or _is_fixed_value(value):
        return value
    if isinstance(value, (list, deque, dict, *_SETS)) or _has_memory(value):
        new = copies[id(value)] = copy.copy(value)
        if isinstance(value, dict):
            dict.update(new, {key: copied_contents(item, copies) for key, item in dict.items(value)})
        elif isinstance(value, (list, deque)):
            for i, item in enumerate(value):
                new[i] = copied_contents(item, copies)
        return new
    names = _attributes(value)
    if names is None:
        return value
    new = copies[id(value)] = copy.copy(value) if isinstance(value, _NAMESPACES) else object.__new__(type(value))
    for name in names:
        object.__setattr__(new, name, copied_contents(getattr(value, name), copies))
    return new


def shown_contents(value: Any) -> str:
    """Return a short text for an argument in a message; for an object, the text shows the class and the attributes."""
    names = _attributes(value)
    if names is None or isinstance(value, (*_ITEMS, *_SETS, dict)):
        return shown(value)
    return f"{type(value).__name__}({', '.join(f'{name}={shown(getattr(value, name))}' for name in names)})"
