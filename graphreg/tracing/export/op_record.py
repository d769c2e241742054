"""The op record of one torch.export run: each operation in the form that torch.fx would give it, and the model's inputs and output."""

from __future__ import annotations

import dis
import operator
import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, fields, is_dataclass
from functools import lru_cache
from types import CodeType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import is_tensor_method_or_property

from graphreg.ir.call_records import CallRecord
from graphreg.ir.made_objects import MadeObject, making
from graphreg.ir.operations import SIZE_ATTRIBUTES, SIZES
from graphreg.ir.source_location import Origin
from graphreg.torch_internals.operators import HigherOrderOperator

PLAIN = (
    float, int, bool, str, complex, type(None), type(...), torch.dtype, torch.device, torch.memory_format, torch.layout,
)  # fmt: skip
SYMBOLS = (torch.SymInt, torch.SymFloat, torch.SymBool)
TENSOR_ATTRIBUTES = {"T", "mT", "H", "mH", "real", "imag", "data"}
# These functions are not recorded. Most of them return a number or a bool to Python, which torch.export itself keeps track of.
PYTHON_RESULTS = SIZES | {
    "__bool__", "__int__", "__float__", "__index__", "__complex__", "__len__", "__contains__", "__iter__", "__repr__", "__format__",
    "__hash__", "__array__", "__set__", "__deepcopy__", "allclose", "equal", "is_nonzero", "requires_grad_", "is_same_size",
}  # fmt: skip
# methods of tensors whose results follow from what a graph of torch.export fixes or asserts (dtype, device, sizes)
FIXED_RESULTS = {
    "size", "dim", "ndimension", "numel", "nelement", "stride", "type", "get_device", "element_size", "is_floating_point", "is_complex",
    "is_signed", "is_same_size",
}  # fmt: skip
OPERATOR_NAMES = {
    "add": "add", "sub": "sub", "mul": "mul", "div": "truediv", "matmul": "matmul", "remainder": "mod", "neg": "neg", "lt": "lt",
    "le": "le", "gt": "gt", "ge": "ge", "eq": "eq", "ne": "ne", "abs": "abs", "pow": "pow", "add_": "iadd", "sub_": "isub",
    "mul_": "imul", "div_": "itruediv", "pow_": "ipow", "remainder_": "imod",
}  # fmt: skip


DIFFERENTIATES = "it differentiates by torch.func, and a graph would fix how deeply torch.func's transforms are nested"


class UnsupportedValue(Exception):
    """The export front end cannot record a call or a value.

    The call returns no tensor, the value has no node and a graph cannot hold it, or the model's own code does what only an opaque module
    may do.
    """


@dataclass(frozen=True)
class OpCall:
    """One operation of the user's code.

    Attributes:
        op: The kind of node, as in torch.fx: ``call_module``, ``call_function`` or ``call_method``.
        target: What the operation calls: a path, a function or the name of a method.
        scope: The path of the module whose code calls the operation.
        swapped: Whether the first two arguments are in reverse order, as in ``2 - x``.
        more: Arguments to append.
        origin: The line of the user's code; None if it is not known.
    """

    op: str
    target: Any
    scope: str
    swapped: bool = False
    more: tuple[Any, ...] = ()
    origin: Origin | None = None


@dataclass(frozen=True)
class Built:
    """How to make an object that is no plain container, such as a dataclass.

    Attributes:
        kind: The class of the object.
        parts: The object's values, by attribute or key, with nodes in place of tensors.
        keyed: Whether the object is made from one dict, like an OrderedDict, instead of from keyword arguments.
    """

    kind: type
    parts: dict[str, Any]
    keyed: bool = False


@dataclass(frozen=True, eq=False)
class Made:
    """How to make an object that the forward returns: the function, and its arguments, with nodes in place of tensors."""

    function: MadeObject
    values: list[Any]


# The key in node.meta of a node's place: its index in the graph that torch.export traces. When torch.export makes further graphs from that
# one, it copies the place to their nodes.
AT = "graphreg_at"


class _RecordedOp(HigherOrderOperator):
    """The operator that replaces a recorded operation in torch.export's graph. Its first argument is the key in ``OpRecord.calls``."""

    def __init__(self) -> None:
        super().__init__("graphreg_recorded_op")  # type: ignore[no-untyped-call]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, **kwargs)  # type: ignore[no-untyped-call]


RECORDED_OP = _RecordedOp()


class KeepOpaque(BaseException):
    """Ends the trace of a submodule that must become opaque. An ``except Exception`` in a forward must not catch it."""


class UntraceableModel(RuntimeError):
    """The model's own code does something that a graph would lose. The message says what, so the model is not run to find the cause."""


ReturnedTensors = list[tuple[fx.Node, tuple[str, ...], bool]]  # of each tensor: node, ports, ``Label.default``


@dataclass
class OpRecord:
    """What was recorded during one run of torch.export.

    Attributes:
        calls: The operations by key.
        returns: A dict. Each key is a node, or None for the time before the first node; the value lists the events after this node and
            before the next. An event is a return of a module (path, class name, tensors) or a read of a size (operation, path of the
            reading module, node of the tensor). torch.export's graph has no node for a read of a size. The read is recorded because it is
            a node in a symbolic trace, so that it counts in the numbering of names.
        module_calls: torch.export's key of each call of a submodule that is traced, and its record, with torch.export's nodes.
        abandoned: The nodes of a submodule that became opaque while it was traced.
        opaque: The opaque modules by path, with reasons.
        arguments: The model's arguments, with nodes in place of tensors.
        output: The model's output, with nodes in place of tensors.
        input_places: The places (``AT``) of the graph's inputs.
        op_guards: Indices of the size guards that operations made. The forward itself made the other guards.
        decisions: Each condition on sizes (a sympy expression) whose answer the forward itself asked for, and the answer. For some of
            them, torch.export makes no guard: it assumes that no variable size is 0 or 1, and takes the answer for certain.
        squeezed: Conditions on sizes (sympy expressions) that decide the shape of what a ``squeeze`` returns.
        flags: The ``requires_grad`` of each parameter for which the forward read it, by the parameter's name.
        asks_layout: Whether the forward asked how a value lies in memory (``stride``).
        strides: The nodes of the values for which it did.
        answers: Each other question of the model's code to which a method of a tensor gave a plain value (``is_contiguous``): the node of
            the tensor, the method's name, further arguments, and the answer.
        assigned: The names of the model's own buffers to which the forward assigned another tensor.
        final_attributes: Each namespace in which the forward may leave something (``final_state``), and its content when the forward ended.
    """

    calls: dict[str, OpCall] = field(default_factory=dict)
    returns: dict[fx.Node | None, list[tuple[str, str, ReturnedTensors | fx.Node]]] = field(default_factory=dict)
    module_calls: list[tuple[str, CallRecord]] = field(default_factory=list)
    abandoned: set[fx.Node] = field(default_factory=set)
    opaque: dict[str, str] = field(default_factory=dict)
    arguments: Any = None
    output: Any = None
    input_places: list[int] = field(default_factory=list)
    op_guards: set[int] = field(default_factory=set)
    decisions: list[tuple[Any, bool]] = field(default_factory=list)
    squeezed: list[Any] = field(default_factory=list)
    flags: dict[str, bool] = field(default_factory=dict)
    asks_layout: bool = False
    strides: set[fx.Node] = field(default_factory=set)
    answers: list[tuple[fx.Node, str, tuple[Any, ...], dict[str, Any], Any]] = field(default_factory=list)
    assigned: set[str] = field(default_factory=set)
    final_attributes: list[tuple[dict[str, Any], dict[str, Any]]] = field(default_factory=list)


def called_by_operator() -> bool:
    """Return whether the calling code wrote ``x / y`` and not ``x.div(y)``: ``__torch_function__`` gets the same function for both."""
    frame = sys._getframe(2)
    name = dis.opname[frame.f_code.co_code[frame.f_lasti]]
    return name.startswith(("BINARY_", "UNARY_", "COMPARE_", "INPLACE_"))


def size_reads(function: Callable[..., Any]) -> list[str]:
    """Return the names of the operations that a symbolic trace would record for the calling code, if it reads a size; else an empty list.

    For ``n, c = x.shape`` they are ``getattr`` and twice ``getitem``. An index counts only if it is applied directly, not to a shape that
    was assigned to a name first.
    """
    name = getattr(function, "__name__", "")
    if name == "__get__" and getattr(getattr(function, "__self__", None), "__name__", "") in SIZE_ATTRIBUTES:
        name = "getattr"
    elif name not in ("size", "dim", "numel", "nelement", "stride"):
        return []
    frame = sys._getframe(2)  # the code that called torch, and so ``__torch_function__``
    return [name, *["getitem"] * _indices(frame.f_code, frame.f_lasti)]


@lru_cache(512)
def _indices(code: CodeType, place: int) -> int:
    """Return how often the result of the instruction at ``place`` is indexed or unpacked by the instructions after it."""
    count, above = 0, 0  # above: how many values are above the result on Python's stack
    for instruction in dis.get_instructions(code):
        if instruction.offset <= place:
            continue
        name = instruction.opname
        if above == 0 and name == "UNPACK_SEQUENCE":
            return count + (instruction.arg or 0)
        indexes = name == "BINARY_SUBSCR" or (name == "BINARY_OP" and instruction.argrepr == "[]")
        if (indexes and above == 1) or (name == "BINARY_SLICE" and above == 2):
            count, above = count + 1, 0
        elif name.startswith(("LOAD_", "BUILD_SLICE")):
            above += dis.stack_effect(instruction.opcode, instruction.arg)
        else:
            break
    return count


def switches_gradients(function: Callable[..., Any], args: Any, kwargs: Any) -> bool:
    """Return whether a call, such as ``x.requires_grad_()`` or ``x.requires_grad = False``, would change its tensor's ``requires_grad``."""
    name = getattr(function, "__name__", "")
    is_setter = name == "__set__" and getattr(getattr(function, "__self__", None), "__name__", "") == "requires_grad"
    if name != "requires_grad_" and not is_setter:
        return False
    wanted = args[1] if len(args) > 1 else kwargs.get("requires_grad", True)
    return bool(args[0].requires_grad) != bool(wanted)


def call_of(function: Callable[..., Any], by_operator: bool, scope: str) -> OpCall | None:
    """Return the call as torch.fx would record it, or None for a function that is not recorded, such as one that returns a number.

    Args:
        function: The function or method of torch.
        by_operator: Whether the code used an operator, as in ``x / y``.
        scope: The path of the module whose code calls it.
    """
    name = getattr(function, "__name__", "")
    if name == "__get__":
        attribute = getattr(getattr(function, "__self__", None), "__name__", "")
        return OpCall("call_function", getattr, scope, more=(attribute,)) if attribute in TENSOR_ATTRIBUTES else None
    if name in PYTHON_RESULTS or not name:
        return None
    if not is_tensor_method_or_property(function) and getattr(function, "__objclass__", None) is None:
        return OpCall("call_function", function, scope)
    if name.startswith("__"):
        # these methods of tensors have other names in Python's ``operator``
        bare = {"div": "truediv", "idiv": "itruediv", "rdiv": "rtruediv"}.get(name.strip("_"), name.strip("_"))
        bare = {"and": "and_", "or": "or_", "rand": "rand_", "ror": "ror_"}.get(bare, bare)
        if hasattr(operator, bare):
            return OpCall("call_function", getattr(operator, bare), scope)
        # ``2 - x`` is a call of ``x.__rsub__``, and torch.fx records ``sub(2, x)``
        if bare.startswith("r") and hasattr(operator, bare[1:]):
            return OpCall("call_function", getattr(operator, bare[1:]), scope, swapped=True)
        return None
    if by_operator and name in OPERATOR_NAMES:
        return OpCall("call_function", getattr(operator, OPERATOR_NAMES[name]), scope)
    return OpCall("call_method", name, scope)


class TensorMap:
    """Replaces the tensors and sizes in nested values, and describes objects as ``Built`` or ``Made``."""

    def __init__(self, replace: Callable[[Any], Any], strict: bool = False, held: Collection[int] | None = None) -> None:
        """Say what to do.

        Args:
            replace: Returns the node or proxy of a tensor or size.
            strict: Whether to refuse objects. They must be refused among the arguments of an operation, which needs the object itself.
            held: In an output, the ids of objects that were there before the forward. Those that the forward made are ``Made``.
        """
        self.replace, self.strict, self.held = replace, strict, held
        self.made: dict[int, Made] = {}  # by the ids of the objects

    def of(self, value: Any) -> Any:
        """Return a value with the replacements. Raise UnsupportedValue if it holds something that a graph cannot make."""
        if isinstance(value, Tensor):
            return self.replace(value)
        if isinstance(value, SYMBOLS):
            constant = value.node.maybe_as_int() if isinstance(value, torch.SymInt) else None
            return self.replace(value) if constant is None else constant
        if isinstance(value, PLAIN):
            return value
        if isinstance(value, slice):
            return slice(self.of(value.start), self.of(value.stop), self.of(value.step))
        if type(value) in (tuple, torch.Size):
            return tuple(map(self.of, value))
        if type(value) is list:
            return list(map(self.of, value))
        if type(value) is dict:
            return {key: self.of(item) for key, item in value.items()}
        if self.strict:
            raise UnsupportedValue(f"{type(value).__name__} among the arguments of an operation")
        return self._built(value)

    def _built(self, value: Any) -> Any:
        """Describe a dataclass, a named tuple, a subclass of dict or another object; raise UnsupportedValue if a graph cannot make it."""
        kind = type(value)
        if is_dataclass(value):
            parts = {f.name: (getattr(value, f.name), f.default) for f in fields(value) if f.init}
            return Built(kind, {name: self.of(part) for name, (part, default) in parts.items() if part is not None or default is not None})
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return Built(kind, {name: self.of(part) for name, part in zip(value._fields, value, strict=True)})
        if isinstance(value, dict):
            return Built(kind, {key: self.of(part) for key, part in value.items()}, keyed=True)
        if id(value) in self.made:
            return self.made[id(value)]
        call = None if self.held is None else making(value, lambda part: isinstance(part, (Tensor, *SYMBOLS)), self.held)
        if call is None:
            raise UnsupportedValue(f"a value of type {kind.__name__}, which a graph cannot make or take apart")
        made = self.made[id(value)] = Made(call[0], list(map(self.of, call[1])))
        return made


def holds_tensors(value: Any) -> bool:
    """Return whether a value is a tensor, or a tuple or list that has tensors and otherwise only None."""
    if isinstance(value, (tuple, list)):
        return any(map(holds_tensors, value)) and all(part is None or holds_tensors(part) for part in value)
    return isinstance(value, Tensor)


def recurrent_value(layer: nn.RNNBase, x: Any, hx: Any = None) -> Any:
    """Return tensors with the shapes of a recurrent layer's results. Running the layer would loop over time, and so fix the length."""
    if not isinstance(x, Tensor):
        raise UnsupportedValue("a PackedSequence, whose sizes depend on data")
    sides, hidden = 1 + layer.bidirectional, layer.proj_size or layer.hidden_size
    batch = () if x.dim() == 2 else (x.shape[0 if layer.batch_first else 1],)
    out = x.new_empty((*x.shape[:-1], sides * hidden))
    state = x.new_empty((sides * layer.num_layers, *batch, hidden))
    if not isinstance(layer, nn.LSTM):
        return out, state
    return out, (state, x.new_empty((sides * layer.num_layers, *batch, layer.hidden_size)))
