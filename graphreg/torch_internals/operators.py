"""torch's operators: their names and schemas, and the dispatch keys for which they have a kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch._ops import HigherOrderOperator as HigherOrderOperator
from torch._ops import OpOverload as OpOverload
from torch._ops import OpOverloadPacket as OpOverloadPacket
from torch._ops import _OpNamespace

# A softmax that returns zeros, not nan, for a row that is masked completely. torch's own attention uses it, and there is no public one.
safe_softmax: OpOverloadPacket = torch.ops.aten._safe_softmax
# An assertion on the values of a tensor that can be part of a compiled graph; ``assert`` would need the values in Python.
assert_async = torch._assert_async


def schema_of(operator: Any) -> Any:
    """Return an operator's schema: its arguments and results, which of them alias, and which are written into.

    None for a higher-order operator.
    """
    return getattr(operator, "_schema", None)


def overload_name(operator: OpOverload) -> str:
    """Return the name of an overload: ``Tensor`` for ``aten.add.Tensor``. graphreg pickles operators by name."""
    return str(operator._overloadname)


def qualified_name(packet: OpOverloadPacket) -> str:
    """Return ``aten::add`` for ``torch.ops.aten.add``."""
    return str(packet._qualified_op_name)


def packet_of(operator: Any) -> Any:
    """Return ``aten.add`` for ``aten.add.Tensor``, as in the keys of torch's FLOP registry; anything but an overload as it is."""
    return getattr(operator, "_overloadpacket", operator)


def is_name_of_namespace(name: str) -> bool:
    """Whether namespaces such as ``torch.ops.aten`` have an attribute of this name that is not an operator, as they have ``name``."""
    return hasattr(_OpNamespace, name)


def has_kernel(operator: OpOverload, key: str | None = None) -> bool:
    """Whether an operator has any kernel, or one for the dispatch key ``key``.

    An operator that only TorchScript implements has none. One with a kernel for ``CompositeImplicitAutograd`` is composed of others, and
    their schemas describe aliases more exactly than its own. A kernel for ``Meta`` computes shapes without data.
    """
    name = str(operator.name())  # type: ignore[no-untyped-call]
    if key is None:
        return torch._C._dispatch_has_kernel(name)
    return torch._C._dispatch_has_kernel_for_dispatch_key(name, key)
