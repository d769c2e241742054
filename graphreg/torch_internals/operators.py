"""torch's operators: their names and schemas, and the dispatch keys for which they have a kernel."""

from __future__ import annotations

from inspect import unwrap
from types import FunctionType
from typing import Any

import torch
from torch._library.custom_ops import OPDEFS
from torch._library.custom_ops import CustomOpDef as CustomOpDef
from torch._ops import HigherOrderOperator as HigherOrderOperator
from torch._ops import OpOverload as OpOverload
from torch._ops import OpOverloadPacket as OpOverloadPacket
from torch._ops import _OpNamespace

# A softmax that returns zeros, not nan, for a row in which every entry is masked. torch's attention uses this operator, which has no public
# name.
safe_softmax: OpOverloadPacket = torch.ops.aten._safe_softmax
# Asserts that a tensor is true. A compiled graph can contain this function, but not Python's ``assert``, which needs the tensor's value in
# Python.
assert_async = torch._assert_async


def schema_of(operator: Any) -> Any:
    """Return the schema of an operator; None for a higher-order operator.

    The schema lists the arguments and results, and says which of them alias, and into which arguments the operator writes.
    """
    return getattr(operator, "_schema", None)


def overload_name(operator: OpOverload) -> str:
    """Return the name of an overload: ``Tensor`` for ``aten.add.Tensor``. graphreg pickles operators by name."""
    return str(operator._overloadname)


def qualified_name(packet: OpOverloadPacket) -> str:
    """Return the name of a packet with its namespace: ``aten::add`` for ``torch.ops.aten.add``."""
    return str(packet._qualified_op_name)


def packet_of(operator: Any) -> Any:
    """Return the packet of an overload: ``aten.add`` for ``aten.add.Tensor``. Return any other object unchanged.

    The keys of torch's FLOP registry are packets.
    """
    return getattr(operator, "_overloadpacket", operator)


def overloads_of(operator: OpOverload | OpOverloadPacket | str) -> list[OpOverload]:
    """Return all overloads of a packet or of the aten operator with a name; an overload in a list; [] if there is no such operator."""
    if isinstance(operator, OpOverload):
        return [operator]
    packet: Any = operator
    if isinstance(operator, str):
        is_internal = not operator.isidentifier() or operator.startswith("__") or is_name_of_namespace(operator)
        packet = None if is_internal else getattr(torch.ops.aten, operator, None)
    return [getattr(packet, name) for name in packet.overloads()] if isinstance(packet, OpOverloadPacket) else []  # type: ignore[no-untyped-call]


def is_name_of_namespace(name: str) -> bool:
    """Return whether the class of ``torch.ops.aten`` has an attribute ``name``. No operator can have such a name, e.g. ``__getattr__``."""
    return hasattr(_OpNamespace, name)


def has_kernel(operator: OpOverload, key: str | None = None) -> bool:
    """Return whether an operator has a kernel for the dispatch key ``key``; without ``key``, whether it has any kernel.

    An operator that only TorchScript implements has no kernel. An operator with a kernel for ``CompositeImplicitAutograd`` is composed of
    other operators. Their schemas describe aliases more exactly than the schema of the composed operator. A kernel for ``Meta`` computes
    shapes without data.
    """
    name = str(operator.name())  # type: ignore[no-untyped-call]
    if key is None:
        return torch._C._dispatch_has_kernel(name)
    return torch._C._dispatch_has_kernel_for_dispatch_key(name, key)


def python_operators() -> dict[str, list[FunctionType]]:
    """Return the functions of each operator that was made of Python functions (``torch.library.custom_op``), by ``namespace::name``."""
    return {name: operator_functions(operator) for name, operator in list(OPDEFS.items())}


def operator_functions(operator: CustomOpDef) -> list[FunctionType]:
    """Return the functions of an operator that ``torch.library.custom_op`` has made."""
    kernels = [unwrap(each) for each in operator._backend_fns.values()]  # torch's, around those that were registered
    within = [cell.cell_contents for kernel in kernels for cell in getattr(kernel, "__closure__", None) or ()]
    parts = (operator._init_fn, operator._abstract_fn, operator._backward_fn, operator._setup_context_fn, operator._vmap_fn, *within)
    return [each for each in parts if isinstance(each, FunctionType)]
