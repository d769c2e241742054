"""Classifies the operation of an fx node or module: product, view, norm, dropout, in-place write, size, tuple, torch's own layer.

The first part is about nodes. The second part is about modules: torch's stacks of layers, layers
that are recorded as one operation, and dropout. Nothing here changes a node.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache, partial
from types import FunctionType, MethodType
from typing import Any, get_args, get_origin, get_type_hints

import torch
from torch import fx, nn
from torch.nn.utils import rnn as packing

from graphreg.ir.operation_probes import ArgumentPlace, Declared, declared, overloads_with_tensors
from graphreg.torch_internals.modules import BatchNormBase, ConstantPadBase, DropoutBase, modules_by_path
from graphreg.torch_internals.operators import OpOverload, OpOverloadPacket, qualified_name, schema_of

# Products mix units through weights. A value that depends on one product and is read by another has
# the role ``hidden``.
PRODUCTS = {
    "linear", "bilinear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d",
    "matmul", "mm", "bmm", "addmm", "baddbmm", "addmv", "mv", "einsum", "tensordot", "embedding", "embedding_bag",
    "multi_head_attention_forward", "__matmul__", "imatmul", "linalg_matmul", "linalg_multi_dot", "chain_matmul", "inner",
    "addbmm", "dot", "_sparse_mm", "smm", "spmm",
}  # fmt: skip
# Operations that only select, reorder, reshape or convert elements: dropout before one of them is
# the same as dropout after it.
VIEWS = {
    "view", "view_as", "reshape", "reshape_as", "flatten", "unflatten", "permute", "transpose", "t", "swapaxes",
    "swapdims", "movedim", "moveaxis", "squeeze", "unsqueeze", "contiguous", "expand", "expand_as", "narrow", "select",
    "getitem", "__getitem__", "chunk", "split", "tensor_split", "unbind", "detach", "to", "float", "half", "double",
    "type_as", "adjoint", "ravel", "squeeze_", "unsqueeze_", "getattr", "atleast_2d", "atleast_3d", "alias",
    "numpy_T", "matrix_H", "mT", "mH",
}  # fmt: skip
SUMS = {"add", "iadd", "add_", "__add__", "__iadd__"}
PACKS = {"pack_padded_sequence", "pack_sequence"}  # functions that return a PackedSequence
MOVES = PACKS | {"pad", "roll", "flip", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle"}
NORMS = {"layer_norm", "batch_norm", "group_norm", "instance_norm", "rms_norm", "local_response_norm", "normalize"}
SPLITS = {"chunk", "split", "tensor_split", "unbind", "split_with_sizes"}
LISTS = SPLITS | {"meshgrid", "sort", "broadcast_tensors", "pad_packed_sequence"}
SIZES = {
    "size", "dim", "numel", "nelement", "ndimension", "item", "tolist", "stride", "is_floating_point", "is_complex",
    "get_device", "element_size", "data_ptr", "storage_offset", "is_contiguous", "type", "len", "_assert",
    "_assert_is_none", "is_tensor", "is_grad_enabled", "is_autocast_enabled",
}  # fmt: skip
SIZE_ATTRIBUTES = {"shape", "ndim", "dtype", "device", "is_cuda", "requires_grad", "layout", "training", "names"}
INTEGERS = {
    "argmax", "argmin", "argsort", "bincount", "eq", "ne", "lt", "le", "gt", "ge", "isnan", "isinf", "isfinite",
    "logical_and", "logical_or", "logical_not", "logical_xor", "long", "int", "bool", "short", "byte", "all", "any",
    "one_hot", "nonzero", "searchsorted", "bucketize", "is_", "is_not", "not_", "contains",
}  # fmt: skip
_INTEGER_TYPES = {torch.int64, torch.int32, torch.bool, torch.uint8, torch.int8, torch.int16}
NORM_MODULES = (
    BatchNormBase, nn.LayerNorm, nn.GroupNorm, nn.LocalResponseNorm, nn.CrossMapLRN2d, nn.RMSNorm,
)  # fmt: skip
VIEW_MODULES = (nn.Flatten, nn.Unflatten, nn.Identity)
MOVE_MODULES = (nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle, ConstantPadBase)
IN_PLACE_NAMES = ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor", "ilshift", "irshift")
IN_PLACE_OPERATORS = {getattr(operator, name) for name in (*IN_PLACE_NAMES, "setitem")}
# Functions that make a tensor of given sizes. If a size is a proxy, they raise unless the trace
# wraps them.
FACTORIES = {
    torch.arange, torch.empty, torch.eye, torch.full, torch.linspace, torch.logspace, torch.ones, torch.rand, torch.randint,
    torch.randn, torch.randperm, torch.tensor, torch.tril_indices, torch.triu_indices, torch.zeros,
}  # fmt: skip
# Functions that a trace records as one call, because they make a tensor from sizes or read lengths.
WRAPPED = FACTORIES | {packing.pack_padded_sequence, packing.pack_sequence, packing.pad_packed_sequence}


# Functions of einops that only move or repeat elements, return several values, or compute with sizes. A trace records each function of
# einops as one call, since its code reads patterns and sizes.
_EINOPS_MOVES = {"rearrange", "repeat", "unpack"}
_EINOPS_LISTS = {"pack", "unpack"}


def is_of_einops(node: fx.Node, module: nn.Module | None = None) -> bool:
    """Return whether the node calls a function of einops, or one of its layers. ``module``: the module that it calls."""
    home = type(module).__module__ if module is not None else getattr(node.target, "__module__", None) if node.op == "call_function" else ""
    return str(home).partition(".")[0] == "einops"


def is_normalization(module: nn.Module) -> bool:
    """Return whether a module is a normalization: by its class, or by the name of its class if it consists of no other modules."""
    return isinstance(module, NORM_MODULES) or ("norm" in type(module).__name__.lower() and not any(module.children()))


def is_scale(module: nn.Module, own: str) -> bool:
    """Return whether a parameter is a vector that is shaped for broadcasting, such as a layer scale [d, 1, 1], and no kernel.

    A kernel of such a shape is called ``weight``, and its module has no other parameter of its shape. ``torch.nn.utils.weight_norm`` calls
    the lengths of a weight's rows ``weight_g`` and their directions ``weight_v``, and its parametrization ``original0`` and ``original1``.

    Args:
        module: The module that owns the parameter.
        own: The name that the parameter has there.
    """
    shapes = {name: each.shape for name, each in module.named_parameters(recurse=False, remove_duplicate=False)}
    shape = shapes.pop(own, None)
    if shape is None or sum(length > 1 for length in shape) > 1:
        return False
    if len(shape) <= 2:
        return own == "original0" or own.endswith("_g")
    if own == "original1" or own.removesuffix("_v") + "_g" in shapes:
        return False
    return "weight" not in own or own.endswith("_g") or shape in shapes.values()


class Operations:
    """Answers questions about the nodes of one model's graphs.

    Attributes:
        modules: The model's modules by path.
    """

    def __init__(self, model: nn.Module) -> None:
        self.modules = modules_by_path(model)

    def module(self, node: fx.Node) -> nn.Module | None:
        return self.modules.get(str(node.target)) if node.op == "call_module" else None

    def is_opaque(self, node: fx.Node) -> bool:
        """Return whether the node calls an opaque module or function: code outside torch and graphreg, which may do anything."""
        if node.op == "call_module" and (module := self.module(node)) is not None:
            return not type(module).__module__.startswith(("torch.nn.", "einops.")) and not is_drop_path(module)
        # making a dataclass or named tuple only stores the arguments
        if node.op != "call_function" or isinstance(node.target, type):
            return False
        home = getattr(node.target, "__module__", None) or "torch"
        return home.partition(".")[0] not in ("torch", "_operator", "math", "builtins", "graphreg", "einops")

    def is_product(self, node: fx.Node) -> bool:
        """Return whether the operation counts as a product: by its name, by its module's parameters, or because it is an opaque function.

        For a function, the caller must check whether an operand is a weight.
        """
        module = self.module(node)
        if module is not None:
            return not isinstance(module, NORM_MODULES) and any(p.dim() >= 2 for p in module.parameters())
        return function_name(node) in PRODUCTS or self.is_opaque(node)

    def is_norm(self, node: fx.Node) -> bool:
        module = self.module(node)
        return isinstance(module, NORM_MODULES) if module is not None else function_name(node) in NORMS

    def is_loss(self, node: fx.Node) -> bool:
        """Return whether the operation is a loss function, such as ``cross_entropy`` or ``nn.MSELoss``."""
        module, name = self.module(node), function_name(node)
        is_function = name.endswith(("_loss", "_entropy", "_with_logits")) or name == "kl_div"
        return is_function or type(module).__module__ == "torch.nn.modules.loss"

    def is_dropout(self, node: fx.Node) -> bool:
        module = self.module(node)
        return is_dropout_module(module) if module is not None else function_name(node) in DROPOUTS

    def passes_through(self, node: fx.Node) -> bool:
        """Return whether the operation is a view, moves elements or is native dropout. Reading its output counts as reading its input."""
        module, name = self.module(node), function_name(node)
        if module is not None:
            moves = isinstance(module, (*VIEW_MODULES, *MOVE_MODULES)) or is_dropout_module(module)
            return moves or (type(module).__name__ == "Rearrange" and is_of_einops(node, module))
        # a part of a split tensor is a view of the tensor; an element of another tuple is no view
        if is_port(node, self):
            source = node.args[0]
            return isinstance(source, fx.Node) and (
                function_name(source) in SPLITS or (function_name(source) == "unpack" and is_of_einops(source))
            )
        return name in _PASSED_THROUGH or (name in _EINOPS_MOVES and is_of_einops(node))

    def is_list(self, node: fx.Node) -> bool:
        """Return whether the value is a tuple or list of tensors."""
        module = self.module(node)
        if self.is_opaque(node):
            return returns_list(node, module) is True or self.guesses_list(node)
        if module is not None:
            returns_indices = getattr(module, "return_indices", False) is True
            return returns_indices or isinstance(module, TUPLES) or _annotated(type(module).forward) is True
        if node.op not in ("call_function", "call_method"):
            return False
        name = function_name(node)
        if name in ("getitem", "__getitem__") and isinstance(node.args[0], fx.Node):
            part_of_list = isinstance(node.args[1], slice) and self.is_list(node.args[0])
            return part_of_list or (port_path(node) == (1,) and isinstance(self.module(node.args[0]), nn.LSTM))
        if name in SUMS:  # ``(h,) + outputs[1:]``
            return isinstance(node.meta.get("value"), list) or any(isinstance(argument, (tuple, list)) for argument in node.args)
        return name in LISTS or results(node) not in (1, None) or (name in _EINOPS_LISTS and is_of_einops(node))

    def guesses_list(self, node: fx.Node) -> bool:
        """Return whether the value is assumed to be a tuple only because the forward indexes it and does nothing else with it."""
        return self.is_opaque(node) and returns_list(node, self.module(node)) is None and _only_indexed(node)


_ASSERTIONS = ("in_parts", "decided_count", "no_singleton", "has_keys")  # of what a tuple is


def function_name(node: fx.Node) -> str:
    """Return the name of the function or method that a node calls, such as ``relu`` or ``view``; ``""`` if it calls neither.

    For an overload, this is the name of the operator: ``add`` for ``aten.add.Tensor``.
    """
    op, target = node.op, node.target
    if op == "call_function":
        return str(schema_of(target).name).rpartition("::")[2] if isinstance(target, OpOverload) else getattr(target, "__name__", "")
    return str(target) if op == "call_method" else ""


def first_argument(node: fx.Node) -> list[fx.Node]:
    """Return a list with the first argument of a call, if that argument is a node; else an empty list."""
    first = node.args[0] if node.args else next(iter(node.kwargs.values()), None)
    return [first] if isinstance(first, fx.Node) else []


def is_in_place(node: fx.Node) -> bool:
    """Return whether the operation writes in place: ``x.add_(y)``, ``torch.relu_(x)``, ``x += y``, ``F.relu(x, inplace=True)``."""
    if node.op == "call_function" and node.target in IN_PLACE_OPERATORS:
        return True
    known = declared_effects(node)
    return bool(in_place_argument(node) if known is None else known.writes)


def in_place_argument(node: fx.Node) -> list[fx.Node]:
    """Return a list with the argument that an operation without a schema writes into; an empty list if it writes into none.

    It writes into its first argument if its name ends in ``_``, or if it is called with
    ``inplace=True``.
    """
    name = function_name(node)
    if is_pythons(node):
        return []
    if name.endswith("_") and not name.endswith("__"):
        return first_argument(node)
    return first_argument(node) if argument_of(node, "inplace") else []


def argument_of(node: fx.Node, name: str) -> object:
    """Return the argument of a call by its parameter name; None if the call does not pass it."""
    if name in node.kwargs or node.op != "call_function" or not callable(node.target):
        return node.kwargs.get(name)
    names = _names(node.target)
    return node.args[names.index(name)] if name in names and names.index(name) < len(node.args) else None


def is_pythons(node: fx.Node) -> bool:
    """Return whether the node calls a function of ``operator``, ``builtins`` or ``math``."""
    return node.op == "call_function" and getattr(node.target, "__module__", None) in ("_operator", "builtins", "math")


def declared_effects(node: fx.Node) -> Declared | None:
    """Return what torch's schemas declare for the operator that has the name of the called function; None if there is no such operator.

    For functions of ``operator``, ``builtins`` and ``math``, return None, too. Also return None for
    a function written in Python, because it may do more than the operator, unless it is a method
    whose operator returns a view of an argument.
    """
    target = node.target
    if isinstance(target, OpOverload):
        return declared(target)
    if isinstance(target, OpOverloadPacket):
        return declared(function_name(node)) if qualified_name(target).startswith("aten::") else None
    if is_pythons(node) or node.op not in ("call_function", "call_method"):
        return None
    function = getattr(torch.Tensor, target, None) if isinstance(target, str) else target
    known = declared(function_name(node))
    if isinstance(function, (FunctionType, MethodType, partial)):
        # a method written in Python is trusted to pass its arguments on to the operator, but only
        # if the operator returns a view (``Tensor.split``)
        return known if node.op == "call_method" and known is not None and known.shares else None
    return known


def placed(node: fx.Node, places: Iterable[ArgumentPlace]) -> list[fx.Node]:
    """Return the nodes that a call passes as certain arguments of its operator. ``places``: the positions and names of these arguments."""
    arguments = []
    for position, name in places:
        names = (name, "input") if name == "self" else (name,)
        arguments.append(node.args[position] if position < len(node.args) else [node.kwargs.get(each) for each in names])
    return list(nodes_in(arguments))


@cache
def _names(function: Callable[..., Any]) -> tuple[str, ...]:
    try:
        return tuple(inspect.signature(function).parameters)
    except (ValueError, TypeError):  # builtins without a signature
        return ()


def returns_list(node: fx.Node, module: nn.Module | None) -> bool | None:
    """Return whether an opaque call returns a tuple or list; None if that is not known.

    This is known from the value for the example inputs, or else from the function's annotation.
    """
    # ``node.meta["value"]`` is a tuple (shape, dtype) if the value is a tensor, and a list of such
    # entries if it is a tuple or list
    value = node.meta.get("value")
    if isinstance(value, (list, tuple)):
        return isinstance(value, list)
    return _annotated(type(module).forward if module is not None else node.target)


@cache
def _annotated(function: Any) -> bool | None:
    try:
        annotation = get_type_hints(function).get("return")
    except Exception:  # an annotation with unknown names, or no function: nothing is known
        return None
    kind = get_origin(annotation) or annotation
    return issubclass(kind, (tuple, list)) if isinstance(kind, type) and issubclass(kind, (tuple, list, torch.Tensor)) else None


def _only_indexed(node: fx.Node) -> bool:
    users = [user for user in node.users if function_name(user) not in _ASSERTIONS]
    return bool(users) and all(takes_apart(user) for user in users)


def results(node: fx.Node) -> int | None:
    """Return how many tensors an operation of torch returns; 1 is a tensor, 0 a list of any length. None: that is not known."""
    function = getattr(torch.Tensor, str(node.target), None) if node.op == "call_method" else node.target
    if isinstance(function, OpOverload):
        return _results_of([function])
    if function_name(node) in ("max", "min", "median", "nanmedian"):  # along an axis, these return the places, too
        axis = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
        return 1 if axis is None else 2 if isinstance(axis, int) else None
    if not isinstance(function, FunctionType):
        return _results_of_builtin(function_name(node))
    # A function that is written in Python may have the name of another operator: ``F.adaptive_max_pool2d`` returns one tensor.
    return _results_of_function(function) if function.__module__.startswith("torch") else None


@cache
def _results_of_builtin(name: str) -> int | None:
    return _results_of(overloads_with_tensors(name))


@cache
def names_of_results(name: str) -> tuple[str, ...]:
    """Return the names of what an operator of torch returns: ``("values", "indices")`` for ``max``; () if it returns one tensor."""
    named = (tuple(each.name for each in schema_of(overload).returns) for overload in overloads_with_tensors(name))
    return next((names for names in named if len(names) > 1), ())


def _results_of(overloads: Iterable[OpOverload]) -> int | None:
    """Return what ``results`` returns; None if the overloads differ."""
    counts = set[int | None]()
    for overload in overloads:
        kinds = [str(each.type) for each in schema_of(overload).returns]
        counts.add(0 if kinds == ["List[Tensor]"] else len(kinds) if kinds[:1] == ["Tensor"] else None)
    return counts.pop() if len(counts) == 1 else None


@cache
def _results_of_function(function: FunctionType) -> int | None:
    try:
        annotation = get_type_hints(function).get("return")
    except Exception:  # an annotation with unknown names
        annotation = None
    if annotation is torch.Tensor or "boolean_dispatch" in function.__qualname__:  # the one without ``return_indices``
        return 1
    if get_origin(annotation) is tuple:
        return len(get_args(annotation))
    return 1 if annotation is None and _results_of_builtin(function.__name__) == 1 else None


def takes_apart(user: fx.Node) -> bool:
    """Return whether a node that reads a tuple takes one item out of it, or only asserts what the tuple is."""
    return function_name(user) in _ASSERTIONS or (function_name(user) == "getitem" and isinstance(user.args[1], int))


def port_path(node: fx.Node) -> tuple[int, ...]:
    """Return the indices that lead to a value in nested tuples: ``(1, 0)`` for the hidden state of an LSTM; () if it is in no tuple."""
    path: tuple[int, ...] = ()
    while function_name(node) in ("getitem", "__getitem__") and isinstance(node.args[0], fx.Node):
        index, source = node.args[1], node.args[0]
        if not isinstance(index, int):
            return ()
        path, node = (index, *path), source
    return path


def is_port(node: fx.Node, operations: Operations) -> bool:
    """Return whether the node takes one element out of a tuple."""
    if function_name(node) not in ("getitem", "__getitem__") or not isinstance(node.args[0], fx.Node):
        return False
    return bool(port_path(node)) and operations.is_list(node.args[0])


def source_of(node: fx.Node, operations: Operations) -> fx.Node:
    """Return the call that returned a tuple of which the node is an item, also an item of an item; the node itself if it is no item."""
    while is_port(node, operations):
        node = node.args[0]  # type: ignore[assignment]
    return node


def nodes_in(value: object) -> Iterator[fx.Node]:
    """Yield every node in a nested argument, in order."""
    if isinstance(value, fx.Node):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from nodes_in(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from nodes_in(item)
    elif isinstance(value, slice):
        yield from nodes_in((value.start, value.stop, value.step))


def is_size(node: fx.Node, size: Callable[[fx.Node], bool]) -> bool:
    """Return whether the value is not a tensor but a number, shape or flag. ``size`` answers this question for an argument of the node."""
    name = function_name(node)
    if name.startswith("sym_"):  # ``torch.sym_max``, and ``aten::sym_size`` of torch.export
        return True
    if name in SIZES:
        return name != "type" or len(node.args) + len(node.kwargs) == 1  # x.type(dtype) is a tensor
    if name == "getattr":
        return node.args[1] in SIZE_ATTRIBUTES
    if name == "parse_shape" and is_of_einops(node):
        return True
    packed = node.args[0] if name == "getitem" and node.args[1] == 1 else None
    if isinstance(packed, fx.Node) and function_name(packed) == "pack" and is_of_einops(packed):  # the shapes of what was packed
        return True
    if node.op != "call_function" or getattr(node.target, "__module__", "") not in ("_operator", "builtins", "math"):
        return False
    inputs = node.all_input_nodes
    return bool(inputs) and all(map(size, inputs))


def is_integer(node: fx.Node) -> bool:
    """Return whether the operation is known to return integers or booleans."""
    if node.op != "call_module" and function_name(node) in INTEGERS:
        return True
    arguments = (*node.args, *node.kwargs.values()) if node.kwargs else node.args
    return any(isinstance(a, torch.dtype) and a in _INTEGER_TYPES for a in arguments)


# Layers that contain layers. A graph of torch.fx has one node for such a layer, because its forward
# branches on masks. torch.export traces into it.
STACKS = (nn.Transformer, nn.TransformerEncoder, nn.TransformerDecoder, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
TUPLES = (nn.RNNBase, nn.LSTMCell, nn.MultiheadAttention)  # layers that return a tuple


def is_stack(m: nn.Module) -> bool:
    """Return whether the module is one of torch's stacks of transformer layers; a subclass defined elsewhere does not count."""
    return isinstance(m, STACKS) and is_torchs(m)


def is_single_operation(m: nn.Module) -> bool:
    """Return whether the export front end records the module as one operation."""
    return is_drop_path(m) or (is_torchs(m) and not isinstance(m, (nn.Sequential, *STACKS)))


def gives_tuple(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Return whether the value is a tuple: the output of one of the layers in ``TUPLES``, or the state of an LSTM.

    A trace needs this to answer ``isinstance(state, tuple)`` in a forward.
    """
    source = node.args[0] if node.target is operator.getitem and node.args[1] == 1 else None
    if isinstance(source, fx.Node):  # the two states of an LSTM
        return source.op == "call_module" and isinstance(modules[str(source.target)], nn.LSTM)
    return node.op == "call_module" and isinstance(modules[str(node.target)], TUPLES)


def is_torchs(m: nn.Module) -> bool:
    """Return whether a module is of a class of torch."""
    return type(m).__module__.startswith(("torch.nn", "torch.ao.nn"))


DROPOUTS = {
    "dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout", "feature_dropout",
    "stochastic_depth", "drop_path", "dropout_", "drop_block2d", "drop_block3d",
}  # fmt: skip
_PASSED_THROUGH = VIEWS | MOVES | DROPOUTS


def is_drop_path(module: nn.Module) -> bool:
    """Return whether the module is stochastic depth, as timm has it, or a class of its kind that another library has.

    It is recorded as one operation, because its graphs in train and in eval mode would differ if it
    were traced into.
    """
    kind = type(module)
    return (
        kind.__name__.lower().endswith("droppath") and isinstance(getattr(module, "drop_prob", None), (int, float))
        and not (module._modules or module._parameters or module._buffers) and len(inspect.signature(kind.forward).parameters) == 2
    )  # fmt: skip


def is_dropout_module(module: nn.Module) -> bool:
    """Return whether the module is one of torch's dropouts, a subclass of one, or stochastic depth."""
    return isinstance(module, DropoutBase) or is_drop_path(module)
