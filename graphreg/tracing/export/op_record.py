"""What torch.export is told of one operation: what it calls, in torch.fx's words, and its arguments with names in place of tensors."""

from __future__ import annotations

import dis
import operator
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, fields, is_dataclass
from functools import lru_cache
from types import CodeType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import is_tensor_method_or_property

from graphreg.ir import SIZE_ATTRIBUTES, SIZES
from graphreg.torch_internals import HigherOrderOperator
from graphreg.tracing.symbolic.proxies import FOREIGN

PLAIN = (
    float, int, bool, str, complex, type(None), type(...), torch.dtype, torch.device, torch.memory_format, torch.layout,
)  # fmt: skip
SYMBOLS = (torch.SymInt, torch.SymFloat, torch.SymBool)
TENSOR_ATTRIBUTES = {"T", "mT", "H", "mH", "real", "imag", "data"}
# What gives Python a number, or decides: torch.export follows these itself.
PYTHONS = SIZES | {
    "__bool__", "__int__", "__float__", "__index__", "__complex__", "__len__", "__contains__", "__iter__", "__repr__", "__format__",
    "__hash__", "__array__", "__set__", "__deepcopy__", "allclose", "equal", "is_nonzero", "requires_grad_", "is_same_size",
}  # fmt: skip
SIGNS = {
    "add": "add", "sub": "sub", "mul": "mul", "div": "truediv", "matmul": "matmul", "remainder": "mod", "neg": "neg", "lt": "lt",
    "le": "le", "gt": "gt", "ge": "ge", "eq": "eq", "ne": "ne", "abs": "abs", "pow": "pow", "add_": "iadd", "sub_": "isub",
    "mul_": "imul", "div_": "itruediv", "pow_": "ipow", "remainder_": "imod",
}  # fmt: skip


class Untold(Exception):
    """A value that torch.export's graph has no name for, or an operation that gives no tensor."""


@dataclass(frozen=True)
class Call:
    """One operation of the user's code, and the path of the module it is in.

    ``swapped``: its first two arguments are the other way round. ``more``: arguments behind those that are given.
    """

    op: str
    target: Any
    scope: str
    swapped: bool = False
    more: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Built:
    """An object of the model's own type: how it is made, and its tensors by attribute or key, with names in their place."""

    kind: type
    parts: dict[str, Any]
    keyed: bool = False  # made from a dict, as an OrderedDict is


AT = "graphreg_at"  # in node.meta: the place of a node, which stays when torch.export makes the nodes anew


class _Kept(HigherOrderOperator):
    """Stands for one operation in torch.export's graph, called with its key in the recording."""

    def __init__(self) -> None:
        super().__init__("graphreg_kept")  # type: ignore[no-untyped-call]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, **kwargs)  # type: ignore[no-untyped-call]


KEPT = _Kept()


class Whole(BaseException):
    """Ends the recording of a submodule that must be kept whole. No forward may catch it."""


class Lost(RuntimeError):
    """What the model's own code does and a recording would lose; known, so that nobody need run the model to see."""


Found = list[tuple[fx.Node, tuple[str, ...], bool]]


@dataclass
class Recording:
    """What was written down. ``calls``: operations by key. ``returns``: behind which node which module returned which values, and
    what was asked of sizes (the operation, the path of the module that asked, the tensor), which has no node but a number.

    ``abandoned``: nodes of a submodule that was kept whole after all. ``given``, ``output``: what the model took and gave, with
    nodes in place of tensors. ``inputs``: the places of its inputs. ``own_guards``: the decisions on sizes that an operation took
    for itself, and takes anew at each call. ``flags``: of which parameters the forward asked whether they require gradients.
    ``left``: the attributes of each module at the end, as they are and as they were then.
    """

    calls: dict[str, Call] = field(default_factory=dict)
    returns: dict[fx.Node | None, list[tuple[str, str, Found | fx.Node]]] = field(default_factory=dict)
    abandoned: set[fx.Node] = field(default_factory=set)
    leaves: dict[str, str] = field(default_factory=dict)
    given: Any = None
    output: Any = None
    inputs: list[int] = field(default_factory=list)
    own_guards: set[int] = field(default_factory=set)
    flags: dict[str, bool] = field(default_factory=dict)
    left: list[tuple[dict[str, Any], dict[str, Any]]] = field(default_factory=list)


def by_sign(depth: int = 2) -> bool:
    """Whether the code that called wrote ``x / y`` rather than ``x.div(y)``: torch tells no difference."""
    frame = sys._getframe(depth)
    name = dis.opname[frame.f_code.co_code[frame.f_lasti]]
    return name.startswith(("BINARY_", "UNARY_", "COMPARE_", "INPLACE_"))


def by_foreign(depth: int = 2) -> bool:
    """Whether the code that called is nobody's model."""
    return str(sys._getframe(depth).f_globals.get("__name__", "")).partition(".")[0] in FOREIGN


def sizes_asked(function: Callable[..., Any], depth: int = 2) -> list[str]:
    """What a symbolic trace has nodes for where the code reads a size: ``n, c = x.shape`` is a getattr and two getitems.

    Indices are seen where they are taken at once, not of a shape that was given a name first.
    """
    name = getattr(function, "__name__", "")
    if name == "__get__" and getattr(getattr(function, "__self__", None), "__name__", "") in SIZE_ATTRIBUTES:
        name = "getattr"
    elif name not in ("size", "dim", "numel", "nelement", "stride"):
        return []
    frame = sys._getframe(depth)
    return [name, *["getitem"] * _indices(frame.f_code, frame.f_lasti)]


@lru_cache(512)
def _indices(code: CodeType, place: int) -> int:
    """How often the value that the instruction at ``place`` gives is indexed or unpacked by those behind it."""
    found, above = 0, 0  # above: what lies on the value, on Python's stack
    for instruction in dis.get_instructions(code):
        if instruction.offset <= place:
            continue
        name = instruction.opname
        if above == 0 and name == "UNPACK_SEQUENCE":
            return found + (instruction.arg or 0)
        indexes = name == "BINARY_SUBSCR" or (name == "BINARY_OP" and instruction.argrepr == "[]")
        if (indexes and above == 1) or (name == "BINARY_SLICE" and above == 2):
            found, above = found + 1, 0
        elif name.startswith(("LOAD_", "BUILD_SLICE")):
            above += dis.stack_effect(instruction.opcode, instruction.arg)
        else:
            break
    return found


def switches(function: Callable[..., Any], args: Any, kwargs: Any) -> bool:
    """Whether a call would make a tensor require gradients that does not, or the other way round."""
    name = getattr(function, "__name__", "")
    own = getattr(getattr(function, "__self__", None), "__name__", "") == "requires_grad"
    if name != "requires_grad_" and not (name == "__set__" and own):
        return False
    wanted = args[1] if len(args) > 1 else kwargs.get("requires_grad", True)
    return bool(args[0].requires_grad) != bool(wanted)


def as_called(function: Callable[..., Any], sign: bool, scope: str) -> Call | None:
    """The call in torch.fx's words; None for what gives no tensor."""
    name = getattr(function, "__name__", "")
    if name == "__get__":
        attribute = getattr(getattr(function, "__self__", None), "__name__", "")
        return Call("call_function", getattr, scope, more=(attribute,)) if attribute in TENSOR_ATTRIBUTES else None
    if name in PYTHONS or not name:
        return None
    if not is_tensor_method_or_property(function) and getattr(function, "__objclass__", None) is None:
        return Call("call_function", function, scope)
    if name.startswith("__"):
        bare = {"div": "truediv", "idiv": "itruediv", "rdiv": "rtruediv"}.get(name.strip("_"), name.strip("_"))
        bare = {"and": "and_", "or": "or_", "rand": "rand_", "ror": "ror_"}.get(bare, bare)
        if hasattr(operator, bare):
            return Call("call_function", getattr(operator, bare), scope)
        if bare.startswith("r") and hasattr(operator, bare[1:]):
            return Call("call_function", getattr(operator, bare[1:]), scope, swapped=True)
        return None
    if sign and name in SIGNS:
        return Call("call_function", getattr(operator, SIGNS[name]), scope)
    return Call("call_method", name, scope)


def mapped(value: Any, named: Callable[[Any], Any], whole: bool = False) -> Any:
    """The value with names in place of its tensors and sizes, and Built in place of objects.

    ``whole``: an object is Untold, for an operation has it whole or not at all.
    """
    if isinstance(value, Tensor):
        return named(value)
    if isinstance(value, SYMBOLS):
        constant = value.node.maybe_as_int() if isinstance(value, torch.SymInt) else None
        return named(value) if constant is None else constant
    if isinstance(value, PLAIN):
        return value
    if isinstance(value, slice):
        return slice(*(mapped(item, named, whole) for item in (value.start, value.stop, value.step)))
    if type(value) in (tuple, torch.Size):
        return tuple(mapped(item, named, whole) for item in value)
    if type(value) is list:
        return [mapped(item, named, whole) for item in value]
    if type(value) is dict:
        return {key: mapped(item, named, whole) for key, item in value.items()}
    if whole:
        raise Untold(f"{type(value).__name__} among the arguments of an operation")
    return _built(value, named)


def _built(value: Any, named: Callable[[Any], Any]) -> Any:
    kind = type(value)
    if is_dataclass(value):
        parts = {f.name: mapped(part, named) for f in fields(value) if f.init and (part := getattr(value, f.name)) is not None}
        return Built(kind, parts)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return Built(kind, {name: mapped(part, named) for name, part in zip(value._fields, value, strict=True)})
    if isinstance(value, dict):
        return Built(kind, {key: mapped(part, named) for key, part in value.items()}, keyed=True)
    raise Untold(f"a value of type {kind.__name__}, which a graph cannot make or take apart")


def holds_tensors(value: Any) -> bool:
    """A tensor, or a tuple or list of tensors, some of which may be None."""
    if isinstance(value, (tuple, list)):
        return any(map(holds_tensors, value)) and all(part is None or holds_tensors(part) for part in value)
    return isinstance(value, Tensor)


def recurrent_value(layer: nn.RNNBase, x: Any, hx: Any = None) -> Any:
    """What a recurrent layer gives, by its sizes alone: its operator would fix the length, for it loops over time."""
    if not isinstance(x, Tensor):
        raise Untold("a PackedSequence, whose sizes depend on data")
    sides, hidden = 1 + layer.bidirectional, layer.proj_size or layer.hidden_size
    batch = () if x.dim() == 2 else (x.shape[0 if layer.batch_first else 1],)
    out = x.new_empty((*x.shape[:-1], sides * hidden))
    state = x.new_empty((sides * layer.num_layers, *batch, hidden))
    if not isinstance(layer, nn.LSTM):
        return out, state
    return out, (state, x.new_empty((sides * layer.num_layers, *batch, layer.hidden_size)))
