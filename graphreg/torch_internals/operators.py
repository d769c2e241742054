"""torch's operators, and what their schemas and kernels tell: names, aliases, which dispatch keys have a kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch._ops import HigherOrderOperator as HigherOrderOperator
from torch._ops import OpOverload as OpOverload
from torch._ops import OpOverloadPacket as OpOverloadPacket
from torch._ops import _OpNamespace

# softmax with zeros, not nan, where nothing may be attended to: what torch's own attention takes, and nothing public gives.
safe_softmax: OpOverloadPacket = torch.ops.aten._safe_softmax
# An assertion on the values of a tensor that a compiled graph carries: ``assert`` would read them.
assert_async = torch._assert_async


def schema_of(operator: Any) -> Any:
    """What an operator takes and gives, with what is a view of what and what is written into; None for one of higher order."""
    return getattr(operator, "_schema", None)


def overload_name(operator: OpOverload) -> str:
    """``Tensor`` of ``aten.add.Tensor``, which pickle is given in its place."""
    return str(operator._overloadname)


def qualified_name(packet: OpOverloadPacket) -> str:
    """``aten::add`` of ``torch.ops.aten.add``."""
    return str(packet._qualified_op_name)


def packet_of(operator: Any) -> Any:
    """``aten.add`` of ``aten.add.Tensor``, by which torch's table of operations counts; whatever is no overload stays as it is."""
    return getattr(operator, "_overloadpacket", operator)


def is_name_of_namespace(name: str) -> bool:
    """Whether ``torch.ops.aten`` has an attribute of this name that is no operator (``name``)."""
    return hasattr(_OpNamespace, name)


def has_kernel(operator: OpOverload, key: str | None = None) -> bool:
    """Whether anything runs the operator, or by a dispatch key: one of TorchScript's alone has no kernel, and one with a kernel for
    ``CompositeImplicitAutograd`` is made of others, whose schemas tell more than its own. ``Meta``: shapes without data."""
    name = str(operator.name())  # type: ignore[no-untyped-call]
    if key is None:
        return torch._C._dispatch_has_kernel(name)
    return torch._C._dispatch_has_kernel_for_dispatch_key(name, key)
