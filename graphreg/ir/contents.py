"""The contents of an argument that is not a tensor: as text, to compare them between calls, and as a copy, to keep them.

A graph is made for the contents that an argument had when the model was traced. The same object may
have other contents at a later call.
"""

from __future__ import annotations

import argparse
import array
import copy
import functools
import sys
import types
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from graphreg.errors import shown
from graphreg.torch_internals import pytree
from graphreg.torch_internals.dynamo import graph_break, plain_number, traces_objects

# Packages that hold no code of a model. If their code asks for the class of a proxy, it gets the
# proxy's class; if a model's code asks, the trace raises an error. functools is left out, because
# singledispatch checks classes on behalf of the model.
FOREIGN = sys.stdlib_module_names - {"__main__", "functools"} | {
    "torch", "graphreg", "numpy", "scipy", "pandas", "networkx", "sympy", "einops",
}  # fmt: skip

# Python refuses to write whole numbers of thousands of digits in decimal; these are written in
# hexadecimal
_DECIMAL = 1 << 60
_FIXED = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, Enum, range, type, types.FunctionType)
_NO_CONTENTS = (type, nn.Module, Tensor, types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.ModuleType)
_NAMESPACES = (types.SimpleNamespace, argparse.Namespace)
_ITEMS = (list, tuple, deque)
_SETS = (set, frozenset)
_BUFFERS = (bytearray, array.array)
# the classes that tracers, transforms and meshes of devices give a tensor that is a plain one for
# the model's code
_STAND_INS = frozenset({"FakeTensor", "FunctionalTensor", "ProxyTensor", "DTensor", "AsyncCollectiveTensor", "NestedTensor", "Proxy"})
_CALLS = (types.MethodType, functools.partial)
_WRITTEN = (bool, str, torch.dtype, torch.device)
_NUMBERS = (int, float, torch.SymInt, torch.SymFloat, torch.SymBool)
_RECORDER = "graphreg.tracing.reads"
_PLAIN_NAMES = {int: "int", float: "float", torch.SymInt: "int", torch.SymFloat: "float", torch.SymBool: "bool"}


def called_by_foreign_code(between: int = 0) -> bool:
    """Return whether the code that called the caller belongs to torch, graphreg or another package of ``FOREIGN``, not to the model.

    ``between``: the number of frames between the two that do not count.
    """
    return calling_module(3 + between).partition(".")[0] in FOREIGN


def calling_module(depth: int) -> str:
    """Return the name of the Python module whose code is ``depth`` frames up the stack.

    The functions by which a trace records reads of attributes stand between the code that reads and
    a property, and do not count.
    """
    frame: types.FrameType | None = sys._getframe(depth)
    while frame is not None and frame.f_globals.get("__name__") == _RECORDER:
        frame = frame.f_back
    return "" if frame is None else str(frame.f_globals.get("__name__", ""))


# objects in order; or, quicker, but not for Dynamo, the number of each by its id
Seen = list[Any] | dict[int, int]


class TensorKind:
    """Stands for a tensor in the kept arguments of a call (``copied_contents``): it has the tensor's class, dtype and number of dims."""

    def __init__(self, kind: type, dtype: torch.dtype | None, dims: int) -> None:
        self.kind, self.dtype, self.dims = kind, dtype, dims

    def __repr__(self) -> str:
        return "a tensor" if self.kind is Tensor else f"a {self.kind.__name__}"

    def __reduce__(self) -> tuple[Any, ...]:
        kind = self.kind
        # pickle would not find the class
        if getattr(sys.modules.get(kind.__module__), kind.__qualname__, None) is not kind:
            kind = _Elsewhere
        return TensorKind, (kind, self.dtype, self.dims)


class _Elsewhere:
    """In a pickle, stands for the class of a tensor that no module has as an attribute."""


def _class(kind: type) -> str:
    """Return a text for a class. Classes of the same name have different texts."""
    return f"{kind.__module__} {kind.__qualname__} {id(kind)}"


def _tensor_class(kind: type) -> str:
    """Return a text for the class of a tensor: ``""`` for torch.Tensor, and for what a tracer or a mesh of devices has in its place."""
    if kind is Tensor or kind.__name__ in _STAND_INS:
        return ""
    return " Parameter" if kind is nn.Parameter else f" {_class(kind)}"


def contents_of(value: Any, within: tuple[Any, ...] = (), is_data: bool = True, seen: Seen | None = None, loose: int = 0) -> str:
    """Return a text for an argument. Two values that a forward can tell apart have different texts. Dynamo traces this function.

    Args:
        value: The argument, or something in it.
        within: The containers and objects that contain the value, the outermost first.
        is_data: Whether tensors in the value are inputs of the graph. The text of an input has only
            its class, dtype and number of dimensions; the text of any other tensor also has its
            ``id``.
        seen: The tensors and objects that came before the value in the same call, to which those of
            the value are added. The text of one of them has its number in the list.
        loose: What the text leaves out: 1 for the numbers of dimensions of inputs, 2 for these and
            the dtypes of inputs, 3 for these and the values of numbers, 0 for nothing.
    """
    if isinstance(value, (Tensor, TensorKind)):
        again = _again(value, seen)
        # one that is no input counts by itself, even if it is an input, too: the graph has what the trace read
        return again if again and is_data else again + _tensor(value, is_data, loose)

    if value is None or type(value) in _WRITTEN:
        return repr(value)
    if isinstance(value, _NUMBERS) and not isinstance(value, Enum):
        return _number(value, loose)
    if isinstance(value, type):
        return f"<class {id(value)}>"
    if isinstance(value, Proxy):
        return "a tensor" if loose >= 2 else "a proxy"
    if isinstance(value, Enum):
        return f"<{_class(type(value))} {value.name}>"
    if isinstance(value, (str, bytes)):  # of a subclass, whose repr may be anything
        return f"<{_class(type(value))} {str.__repr__(value) if isinstance(value, str) else bytes.__repr__(value)}>"

    # What contains other values. One that contains itself would never end.
    if True in (around := [value is each for each in within]):
        return f"<no. {around.index(True)} around it>"
    if isinstance(value, slice):
        return f"<slice {contents_of((value.start, value.stop, value.step), within, False, seen)}>"
    if isinstance(value, _CALLS):
        return f"<{type(value).__name__} {_call(value, within, seen)}>"
    if isinstance(value, (*_ITEMS, *_SETS, dict)):
        return _items(value, (*within, value), is_data, seen, loose)

    # Objects: by their memory, by their text if it says all, or by their attributes.
    kind = _class(type(value))
    if _has_memory(value):
        # bytes(n) of a number of numpy would be n zeros
        memory = value.tobytes() if hasattr(value, "tobytes") else bytes(value)
        return f"<{kind} {getattr(value, 'dtype', '')} {getattr(value, 'shape', '')} {hash(memory)}>"
    if _is_fixed_value(value):
        return f"<{kind} {value!r}>"

    names = _attributes(value)
    if names is None:
        return f"<{kind} {id(value)}>"
    if again := _again(value, seen):
        return again

    is_data = is_data and type(value) in pytree.SUPPORTED_NODES
    parts = [f"{name}={contents_of(getattr(value, name), (*within, value), is_data, seen, loose if is_data else 0)}" for name in names]
    return f"<{kind} {', '.join(parts)}>"


def _again(value: Any, seen: Seen | None) -> str:
    """Return a text with the number that a tensor or object has in ``seen``; if it has none, add it and return ``""``."""
    if seen is None:
        return ""
    if isinstance(seen, dict):
        count = len(seen)
        number = seen.setdefault(id(value), count)
        return f"<no. {number} again>" if len(seen) == count else ""
    if True in (known := [value is each for each in seen]):
        return f"<no. {known.index(True)} again>"
    seen.append(value)
    return ""


def _tensor(value: Any, is_data: bool, loose: int) -> str:
    of = type(value) if isinstance(value, Tensor) else value.kind
    if loose >= 2 and is_data:
        return "a tensor" if of is Tensor else f"a tensor{_tensor_class(of)}"
    dims = "" if loose and is_data else f"[{value.dim() if isinstance(value, Tensor) else value.dims}]"
    return f"{value.dtype}{dims}{_tensor_class(of)}" + ("" if is_data else f" {id(value)}")


def _number(value: Any, loose: int) -> str:
    name = _PLAIN_NAMES.get(type(value)) or _class(type(value))
    if loose == 3:
        return name
    number = plain_number(value)
    if isinstance(number, int) and not -_DECIMAL < number < _DECIMAL:
        return f"{name} {int(number):#x}"
    return f"{name} {int(number) if isinstance(number, int) else float(number)!r}"


def number_kind(value: Any) -> str:
    """Return ``"int"`` or ``"float"`` for a number of exactly that class, or a symbol of it; ``""`` for anything else."""
    name = _PLAIN_NAMES.get(type(value), "")
    return "" if name == "bool" else name


def _call(value: Any, within: tuple[Any, ...], seen: Seen | None) -> str:
    """Return a text for a bound method or a ``functools.partial``. Another one of the same function and object has the same text."""
    if isinstance(value, types.MethodType):
        return f"{id(value.__func__)} {id(value.__self__)}"
    parts = (value.func, value.args, value.keywords)
    return ", ".join([contents_of(part, (*within, value), False, seen) for part in parts])


def _items(value: Any, within: tuple[Any, ...], is_data: bool, seen: Seen | None, loose: int) -> str:
    kind = "" if type(value) in (list, tuple, dict) else _class(type(value))
    # no tensor in a set, and none that is a key, is an input of the graph
    is_data, loose = (False, 0) if isinstance(value, _SETS) else (is_data, loose)
    if isinstance(value, dict):
        texts = [f"{contents_of(k, within, False)}: {contents_of(item, within, is_data, seen, loose)}" for k, item in value.items()]
        return kind + "{" + ", ".join(texts) + "}"
    texts = [contents_of(item, within, is_data, seen, loose) for item in value]
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


def compares_identity(value: Any, is_data: bool) -> bool:
    """Return whether ``contents_of`` describes an argument, or something in one, by its identity, and not by all its contents."""
    if isinstance(value, Tensor):
        return not is_data
    if value is None or isinstance(value, (Enum, slice, functools.partial, *_WRITTEN, *_NUMBERS, str, bytes, *_ITEMS, *_SETS, dict)):
        return False
    return not _has_memory(value) and not _is_fixed_value(value) and _attributes(value) is None


def _is_foreign(kind: type) -> bool:
    return kind.__module__.partition(".")[0] in FOREIGN


def parts(
    value: Any, within: tuple[Any, ...] = (), is_data: bool = True, seen: set[tuple[int, bool]] | None = None
) -> Iterator[tuple[Any, tuple[Any, ...], bool]]:  # fmt: skip
    """Yield an argument and everything in it that ``contents_of`` describes, with ``within`` and ``is_data`` as they are there.

    What contains itself is yielded once more there. Anything else is yielded once, or once with each value of ``is_data``.
    """
    seen = set() if seen is None else seen
    is_around = any(value is each for each in within)
    if not is_around and (id(value), is_data) in seen:
        return
    seen.add((id(value), is_data))
    yield value, within, is_data
    if is_around or value is None or isinstance(value, (str, bytes, Tensor, Enum, *_NUMBERS)):
        return
    inside, keys = list[Any](), list[Any]()
    if isinstance(value, slice):
        keys = [value.start, value.stop, value.step]
    elif isinstance(value, functools.partial):
        keys = [value.func, value.args, value.keywords]
    elif isinstance(value, _SETS):
        keys = [*value]
    elif isinstance(value, dict):
        keys, inside = [*value], [*value.values()]
    elif isinstance(value, _ITEMS):
        inside = [*value]
    elif not _has_memory(value) and not _is_fixed_value(value):
        is_data = is_data and type(value) in pytree.SUPPORTED_NODES
        inside = [getattr(value, name) for name in _attributes(value) or ()]
    for each, is_input in (*((key, False) for key in keys), *((item, is_data) for item in inside)):
        yield from parts(each, (*within, value), is_input, seen)


def may_change(value: Any) -> bool:
    """Whether the contents of a value may change in place."""
    if isinstance(value, (tuple, frozenset)):
        return any(map(may_change, value))
    return not (isinstance(value, _FIXED) or _is_fixed_value(value))


def copied_contents(value: Any, copies: dict[int, Any] | None = None, is_data: bool = False) -> Any:
    """Return a deep copy of a container or object. Tensors, modules, functions and immutable objects in it are shared, not copied.

    Args:
        value: The value.
        copies: The copies made so far, by the id of what was copied, to which those of the value
            are added.
        is_data: Whether to put a ``TensorKind`` in place of each tensor that is an input of the
            graph.
    """
    copies = {} if copies is None else copies
    if id(value) in copies:
        return copies[id(value)]
    if is_data and isinstance(value, TensorKind):
        return TensorKind(value.kind, value.dtype, value.dims)
    if is_data and isinstance(value, Tensor):
        return copies.setdefault(id(value), TensorKind(type(value), value.dtype, value.dim()))

    if isinstance(value, slice):
        return slice(*(copied_contents(part, copies, is_data) for part in (value.start, value.stop, value.step)))
    if isinstance(value, tuple):
        return _copied_tuple(value, [copied_contents(item, copies, is_data) for item in value])

    if isinstance(value, (*_FIXED, *_NO_CONTENTS, *_CALLS, TensorKind)) or _is_fixed_value(value):
        return value

    if isinstance(value, (list, deque, dict, *_SETS)) or _has_memory(value):
        new = copies[id(value)] = copy.copy(value)
        if isinstance(value, dict):
            dict.update(new, {key: copied_contents(item, copies, is_data) for key, item in dict.items(value)})
        elif isinstance(value, (list, deque)):
            for i, item in enumerate(value):
                new[i] = copied_contents(item, copies, is_data)
        return new

    names = _attributes(value)
    if names is None:
        return value
    is_data = is_data and type(value) in pytree.SUPPORTED_NODES
    new = copies[id(value)] = copy.copy(value) if isinstance(value, _NAMESPACES) else object.__new__(type(value))
    for name in names:
        object.__setattr__(new, name, copied_contents(getattr(value, name), copies, is_data))
    return new


def unshared(kept: Any) -> Any:
    """Return kept arguments (``copied_contents``) in which each tensor has a ``TensorKind`` of its own."""
    return copied_contents(kept, is_data=True)


def _copied_tuple(value: Any, items: list[Any]) -> Any:
    """Return a tuple of the class of ``value``, without a call of a user's constructor."""
    try:
        return tuple.__new__(type(value), items)
    except TypeError:  # a class that is written in C, such as torch.return_types.max
        return type(value)(items)


def shown_contents(value: Any) -> str:
    """Return a short text for an argument in a message; for an object, the text shows the class and the attributes."""
    names = _attributes(value)
    if names is None or isinstance(value, (*_ITEMS, *_SETS, dict)):
        return shown(value)
    return f"{type(value).__name__}({', '.join(f'{name}={shown(getattr(value, name))}' for name in names)})"


def detached(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return a call's arguments, in which leaves replace the tensors that autograd computed. The same tensors are one object there."""
    made: dict[int, Tensor] = {}

    def leaf(tensor: Tensor) -> Tensor:
        if tensor.is_leaf:
            return tensor
        return made.setdefault(id(tensor), tensor.detach().requires_grad_())

    positional, named = pytree.tree_map_only(Tensor, leaf, (tuple(args), dict(kwargs)))
    return positional, named
